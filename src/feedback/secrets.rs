//! Secrets in texts of users, by the forms that they are known to have.
//!
//! The forms of tokens are those that their issuers document and that scanners such as gitleaks and detect-secrets go by;
//! limits on randomness are detect-secrets' own. What has no form, such as a password in a sentence, is not found.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::LazyLock;

use regex::{Captures, Regex};

/// What is put in a secret's place. No rule takes it for a secret.
const PLACEHOLDER: &str = "<secret>";

/// Bits per character from which a text is taken for random, of 6 in base64.
const MIN_ENTROPY: f64 = 4.5;

/// Asked of the group `secret`, or of the whole where there is none.
type Check = fn(&str) -> bool;

struct Rule {
    name: &'static str,
    regex: Regex,
    is_secret: Check,
}

/// In order: what is found by one is not seen by the next. In verbose mode, where blanks are not part of a pattern.
const RULES: [(&str, &str, Check); 17] = [
    (
        "private key",
        r"(?s)-----BEGIN\s(?:[A-Z0-9]+\s)*PRIVATE\sKEY(?:\sBLOCK)?-----
          .*?(?:-----END\s(?:[A-Z0-9]+\s)*PRIVATE\sKEY(?:\sBLOCK)?-----|\z)",
        |_| true,
    ),
    ("AWS access key", r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b", |_| true),
    ("GitHub token", r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{36,}", |_| true),
    ("GitLab token", r"\bgl(?:pat|dt|rt|cbt|ptt)-[\w-]{20,}", is_mixed),
    ("Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bxapp-\d-[A-Za-z0-9-]{10,}", is_mixed),
    ("webhook", r"/(?:services/T[A-Z0-9]{7,}/B[A-Z0-9]{7,}|api/webhooks/\d{16,})/[\w-]{20,}", |_| true),
    ("Google key", r"\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{28}", |_| true),
    ("Stripe key", r"\b(?:sk|rk|whsec)_(?:(?:live|test)_)?[A-Za-z0-9]{20,}", is_mixed),
    ("model provider's key", r"\bsk-[\w-]{20,}|\bhf_[A-Za-z]{34}\b", |text| text.starts_with("hf_") || is_mixed(text)),
    ("JSON web token", r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*", |_| true),
    ("password in a URL", r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\x22`]*:(?<secret>[^\s/@'\x22`]{3,})@", is_password),
    ("authorization header", r"(?i)\b(?:bearer|basic)\s+(?<secret>[A-Za-z0-9._~+/-]{16,}=*)", is_mixed),
    (
        "password",
        r#"(?i)(?:password|passwd|passphrase|pwd)(?:["'\]]|\\")*\s*(?::=|=>|=|:)\s*[rbu]?
           (?:"(?<a>[^"\n]{4,})"|'(?<b>[^'\n]{4,})'|`(?<c>[^`\n]{4,})`)
           |(?:^|\s)--(?:password|passwd|token|api-key|secret)[=\s]["']?(?<d>[^\s"']{4,})"#,
        is_password,
    ),
    (
        // Of variables, options, connection strings and files of settings: `=` without blanks, or a line of its own.
        "password without quotes",
        r#"(?im)(?:password|passwd|passphrase|pwd)=(?<a>[^\s"'`,;&(){}\[\]<>\\=][^\s"'`,;&(){}\[\]<>\\]{3,})(?:[\s"'`;&\\]|\z)
           |^[\x20\t-]*(?:export\s+|set\s+)?["']?[\w.-]*(?:password|passwd|passphrase|pwd)["']?[\x20\t]*[=:][\x20\t]*
            (?<b>[^\s"'`,;&(){}\[\]<>\\=][^\s"'`,;&(){}\[\]<>\\]{3,})[\x20\t]*;?[\x20\t]*(?:[\#].*)?\r?$"#,
        |text| is_mixed(text) && is_password(text) && !is_place(text),
    ),
    (
        "key or token",
        r#"(?i)(?:secret(?:_?key)?|token|(?:api|access|auth|private|account)_?key|credentials?)(?:[_-][\w-]{1,20})?
           (?:["'\]]|\\")*\s*(?::=|=>|=|:)\s*[rbu]?(?:"(?<a>[^"\s]{8,})"|'(?<b>[^'\s]{8,})'|`(?<c>[^`\s]{8,})`)"#,
        |text| is_mixed(text) && is_password(text) && !text.contains("://"),
    ),
    (
        "variable of the environment",
        r"(?m)\b[A-Z0-9_]*(?:PASSWORD|PASSWD|SECRET|TOKEN|KEY)=(?<secret>[^\s\x22'`$(){}<>\\;]{8,})",
        is_mixed,
    ),
    ("random text", r"[A-Za-z0-9+/_-]{32,}={0,2}", is_random),
];

static COMPILED: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let rules = RULES.into_iter().map(|(name, pattern, is_secret)| {
        let regex = Regex::new(&format!("(?x){pattern}")).expect("each of them is compiled by a test");
        Rule { name, regex, is_secret }
    });
    rules.collect()
});

impl Rule {
    fn secrets(&self, text: &str) -> Vec<Range<usize>> {
        let found = self.regex.captures_iter(text).filter_map(|captures| self.place(&captures));
        found.filter(|place| (self.is_secret)(&text[place.clone()])).collect()
    }

    /// Of the first group that has taken part, else of the whole.
    fn place(&self, captures: &Captures<'_>) -> Option<Range<usize>> {
        captures.iter().skip(1).flatten().next().or_else(|| captures.get(0)).map(|found| found.range())
    }
}

/// What was found in one text or several.
#[derive(Debug, Default)]
pub struct Found {
    secrets: BTreeSet<String>,
    /// By rule.
    pub counts: BTreeMap<&'static str, usize>,
}

impl Found {
    /// The text with a placeholder for each secret.
    pub fn scrub(&mut self, text: &str) -> String {
        let mut scrubbed = text.to_owned();
        for rule in &*COMPILED {
            // From the last, so that the places of the others stay.
            for place in rule.secrets(&scrubbed).into_iter().rev() {
                self.secrets.insert(scrubbed[place.clone()].to_owned());
                *self.counts.entry(rule.name).or_default() += 1;
                scrubbed.replace_range(place, PLACEHOLDER);
            }
        }
        scrubbed
    }

    /// Whether `text` repeats what was found elsewhere, in whatever form.
    pub fn is_repeated_in(&self, text: &str) -> bool {
        self.secrets.iter().any(|secret| text.contains(secret))
    }
}

/// The rule by which there is a secret in `text`.
pub fn secret_in(text: &str) -> Option<&'static str> {
    COMPILED.iter().find(|rule| !rule.secrets(text).is_empty()).map(|rule| rule.name)
}

/// As no word is.
fn is_mixed(text: &str) -> bool {
    text.contains(|c: char| c.is_ascii_digit()) && text.contains(|c: char| c.is_ascii_alphabetic())
}

/// Not what stands for one, or says where one comes from.
fn is_password(text: &str) -> bool {
    const STAND_INS: [&str; 16] = [
        "password",
        "passwd",
        "pass",
        "pwd",
        "secret",
        "token",
        "none",
        "null",
        "true",
        "false",
        "string",
        "text",
        "changeme",
        "example",
        "placeholder",
        "required",
    ];
    let lower = text.to_ascii_lowercase();
    let is_filled_in = text.starts_with(['<', '$', '%', '[']) || (text.contains('{') && text.contains('}'));
    let is_masked = text.contains("...") || text.contains("***") || lower.contains("xxx") || lower.starts_with("your");
    let is_call = text.contains('(') && text.contains(')');
    let is_stand_in = STAND_INS.contains(&lower.trim_matches(|c: char| !c.is_ascii_alphabetic()));
    !(text.contains(char::is_whitespace) || is_filled_in || is_masked || is_call || is_stand_in)
}

/// Of a file, or of a field: where a password may come from.
fn is_place(text: &str) -> bool {
    let is_field = || text.split('.').all(|part| part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_'));
    text.starts_with(['/', '~', '.']) || (text.contains('.') && is_field())
}

/// As neither a path nor an identifier is, nor a digest in hexadecimal.
fn is_random(text: &str) -> bool {
    let has = |is: fn(&u8) -> bool| text.bytes().any(|byte| is(&byte));
    has(u8::is_ascii_uppercase)
        && has(u8::is_ascii_lowercase)
        && has(u8::is_ascii_digit)
        && entropy(text) >= MIN_ENTROPY
}

/// Shannon's, of the bytes, in bits per byte.
fn entropy(text: &str) -> f64 {
    let mut counts = [0usize; 256];
    text.bytes().for_each(|byte| counts[usize::from(byte)] += 1);
    let of = |&count: &usize| {
        let share = count as f64 / text.len() as f64;
        -share * share.log2()
    };
    counts.iter().filter(|&&count| count > 0).map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Put together here, so that no scanner takes this file for a leak.
    fn joined(parts: &[&str]) -> String {
        parts.concat()
    }

    const RANDOM: &str = "q7Rk2vXw9LmZ4tPc8NbY3hJd6FsG1aVe5UoT";

    #[test]
    fn each_rule_finds_its_secrets() {
        let dashes = "-----";
        let block = |kind: &str, end: &str| format!("{dashes}BEGIN {kind}PRIVATE KEY{dashes}\nMIIEow\nIBAAK{end}");
        let end = format!("\n{dashes}END RSA PRIVATE KEY{dashes}");
        for (rule, text) in [
            ("private key", block("RSA ", &end)),
            ("private key", block("", " cut off here")),
            ("AWS access key", joined(&["id AKIA", "IOSFODNN7EXAMPLE."])),
            ("GitHub token", joined(&["ghp_", RANDOM])),
            ("GitHub token", joined(&["github_pat_", RANDOM])),
            ("GitLab token", joined(&["glpat-", &RANDOM[..20]])),
            ("Slack token", joined(&["xoxb-", "123456789012-abcdefABCDEF"])),
            ("webhook", joined(&["https://example.com/services/", "T01234567/B01234567/", &RANDOM[..24]])),
            ("Google key", joined(&["AIza", &RANDOM[..35]])),
            ("Stripe key", joined(&["sk_live_", &RANDOM[..24]])),
            ("model provider's key", joined(&["sk-proj-", &RANDOM[..24]])),
            ("model provider's key", joined(&["hf_", "abcdefghijklmnopqrstuvwxyzABCDEFGH"])),
            ("JSON web token", joined(&["eyJ", "hbGciOiJIUzI1NiJ9.eyJ", "zdWIiOiIxMjM0In0.c2lnbmF0dXJl"])),
            ("password in a URL", "postgres://admin:correct-horse@db/prod".to_owned()),
            ("authorization header", format!("Authorization: Bearer {}", &RANDOM[..20])),
            ("authorization header", "curl -H 'authorization: basic YWRtaW46aHVudGVyMg=='".to_owned()),
            ("password", r#"password = "hunter""#.to_owned()),
            ("password", r#"{"db_password": "correct-horse"}"#.to_owned()),
            ("password", "config['passwd'] = 'tr0ub4dor'".to_owned()),
            ("password", "mysqldump --password=hunter2 shop".to_owned()),
            ("password without quotes", "DB_PASSWORD=hunter2".to_owned()),
            ("password without quotes", "export PGPASSWORD=hunter2\npsql".to_owned()),
            ("password without quotes", "db:\n  password: hunter2\n  port: 1".to_owned()),
            ("password without quotes", "- admin_password: hunter2  # for now".to_owned()),
            ("password without quotes", "[client]\r\npassword = hunter2!\r\n".to_owned()),
            ("password without quotes", "spring.datasource.password=hunter2".to_owned()),
            ("password without quotes", "connect(\"Server=db;Password=Hunter2abc;\")".to_owned()),
            ("password without quotes", "\"host=db password=hunter2\"".to_owned()),
            ("password without quotes", "/login?user=a&pwd=hunter2&next=/".to_owned()),
            ("key or token", r#"API_KEY = "0123456789abcdef0123456789abcdef""#.to_owned()),
            ("key or token", "client_secret_v2: 'a1b2c3d4e5'".to_owned()),
            ("variable of the environment", "export DEPLOY_TOKEN=abc123def456".to_owned()),
            ("random text", format!("connect({RANDOM:?})")),
        ] {
            assert_eq!(secret_in(&text), Some(rule), "{text}");
            let mut found = Found::default();
            let scrubbed = found.scrub(&text);
            assert!(scrubbed.contains(PLACEHOLDER) && secret_in(&scrubbed).is_none(), "{text}: {scrubbed}");
            assert!(found.counts.contains_key(rule) && found.is_repeated_in(&text), "{text}: {found:?}");
        }
        assert_eq!(RULES.len(), COMPILED.len());
    }

    #[test]
    fn code_without_secrets_is_left_as_it_is() {
        for text in [
            "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
            "AKIA is how access keys begin",
            "class='sk-loading-spinner-of-the-page'",
            "github_pat_tern = re.compile(r'gh[pousr]_')",
            "postgres://{user}:{password}@{host}/db and http://user:password@localhost:8080/",
            "ssh://git@host:22/repo, see https://example.com/a:b",
            "the bearer of this instruction",
            "password = getpass.getpass()",
            "password = \"\"; passwd = '<your password>'; pwd = '${DB_PASSWORD}'",
            "input(\"Password: \"); label = 'Forgot your password? Ask us'",
            "password: str = Field(...), password = os.environ['DB_PASSWORD']",
            "type=\"password\" name=\"password\"",
            "password: str\npassword: String\npassword = args[1]\npassword = sys.argv[2];\npwd=/home/user2",
            "password = settings.db2.password\npassword: ${DB_PASSWORD_2}\npassword=changeme1\nPASSWORD=",
            "connect(user=user1, password=input2)\nif password==stored1:\n    password=self.password2\npassword := hash2",
            "mysql --password=$MYSQL_PASSWORD, --token \"$(cat token)\", --password PASSWORD",
            "token = \"access_token\"; token_type = 'bearer'; secret_name = \"my-database-secret\"",
            "tokenizer = 'byte-level-v2'; token_url = 'https://example.com/oauth2/token'; tokens: ['a1', 'b2']; key = 'user_id_12345678'",
            "for token in tokens: max_tokens=4096",
            "MAX_KEY=12345678, PUBLIC_KEY=$(cat key.pub)",
            "sha256 = 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'",
            "id = '123e4567-e89b-12d3-a456-426614174000'",
            "/usr/local/lib/python3.11/site-packages/TensorFlow/core/kernels/conv2d",
            "AbstractSingletonProxyFactoryBeanConfigurationTest2",
            "def test_that_the_2nd_Request_of_a_user_is_answered_by_the_same_arm():",
            "ABCDEFGHIJKLMNOPQRSTUVWXYZ, 00000000000000000000000000000000000000",
        ] {
            assert_eq!(secret_in(text), None, "{text}");
            assert_eq!(Found::default().scrub(text), text);
        }
    }

    #[test]
    fn only_the_secret_itself_is_replaced_each_time() {
        let mut found = Found::default();
        let text = "a = connect(password='hunter2')\nb = connect(password='swordfish')";
        let expected = "a = connect(password='<secret>')\nb = connect(password='<secret>')";
        assert_eq!((found.scrub(text).as_str(), found.counts["password"]), (expected, 2));
        assert!(found.is_repeated_in("login('swordfish')") && !found.is_repeated_in("login('password')"));
    }
}

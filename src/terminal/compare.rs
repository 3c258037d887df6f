//! `lorry compare`: a comparison on a running server, as a table.

use std::fmt::Write;
use std::str::FromStr;

use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::generate::print;
use super::server::{ServerArgs, TerminalError};
use crate::columns::columns;

#[derive(Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// What every arm is asked.
    #[arg(long, short)]
    prompt: String,
    /// The text behind the gap, to fill in between.
    #[arg(long)]
    suffix: Option<String>,
    /// Ask as a user in a chat, by each model's chat template.
    #[arg(long, conflicts_with = "suffix")]
    chat: bool,
    /// NAME=MODEL[,icl=STORE@K][,select=HOW][,format=FORMAT]; two or more. Without a MODEL it is the base.
    #[arg(long = "arm", value_name = "ARM", required = true)]
    arms: Vec<Arm>,
    /// Most output tokens of an arm.
    #[arg(long, default_value_t = 128)]
    max_tokens: u32,
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<i64>,
    /// Text that ends an output; may be repeated.
    #[arg(long)]
    stop: Vec<String>,
    /// Print the server's reply as it is.
    #[arg(long)]
    json: bool,
}

/// An arm as the command line names it: the fields of the request.
#[derive(Debug, Clone, PartialEq)]
pub struct Arm(Map<String, Value>);

impl FromStr for Arm {
    type Err = String;

    fn from_str(arm: &str) -> Result<Self, String> {
        let (name, rest) = arm.split_once('=').ok_or("an arm is NAME=MODEL")?;
        let mut parts = rest.split(',');
        let mut fields = Map::new();
        fields.insert("name".to_owned(), name.into());
        if let Some(model) = parts.next().filter(|model| !model.is_empty()) {
            fields.insert("model".to_owned(), model.into());
        }
        let mut select = None;
        for part in parts {
            let is_said_before = match part.split_once('=') {
                Some(("icl", icl)) => {
                    let examples = icl.rsplit_once('@').and_then(|(store, k)| Some((store, k.parse::<u32>().ok()?)));
                    let (store, k) = examples.ok_or_else(|| format!("`{part}` must be icl=STORE@K"))?;
                    fields.insert("icl".to_owned(), json!({"store": store, "k": k})).is_some()
                }
                Some(("select", how)) => select.replace(how).is_some(),
                Some(("format", format)) => fields.insert("prompt_format".to_owned(), format.into()).is_some(),
                _ => return Err(format!("`{part}` is not icl=STORE@K, select=HOW or format=FORMAT")),
            };
            if is_said_before {
                return Err(format!("`{part}` is said twice"));
            }
        }
        if let Some(how) = select {
            fields.get_mut("icl").ok_or("select= needs icl=STORE@K")?["select"] = how.into();
        }
        Ok(Self(fields))
    }
}

#[derive(Debug, Deserialize)]
struct Reply {
    seed: i64,
    arms: Vec<ArmReply>,
}

#[derive(Debug, Deserialize)]
struct ArmReply {
    name: String,
    error: Option<ErrorReply>,
    #[serde(default)]
    model: String,
    #[serde(default)]
    text: String,
    usage: Option<UsageReply>,
    ttft_ms: Option<f64>,
    tpot_ms: Option<f64>,
    total_ms: Option<f64>,
    logprob: Option<f64>,
    agreement: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct ErrorReply {
    message: String,
}

#[derive(Debug, Deserialize)]
struct UsageReply {
    prompt_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: CachedReply,
}

#[derive(Debug, Deserialize)]
struct CachedReply {
    cached_tokens: usize,
}

/// Asks the server and prints. Blocks until every arm has ended.
///
/// # Errors
/// No server, or one that refuses the comparison; nobody who reads the table.
pub fn run(args: &CompareArgs) -> Result<(), TerminalError> {
    let reply: Value = serde_json::from_reader(args.server.post("/v1/compare", &request(args))?)?;
    let text = if args.json { format!("{reply:#}\n") } else { table(&serde_json::from_value(reply)?) };
    print(&text)
}

fn request(args: &CompareArgs) -> Value {
    let mut request = json!({"max_tokens": args.max_tokens, "temperature": args.temperature, "on_error": "skip"});
    request["arms"] = args.arms.iter().map(|Arm(fields)| Value::Object(fields.clone())).collect();
    if args.chat {
        request["messages"] = json!([{"role": "user", "content": args.prompt}]);
    } else {
        request["prompt"] = args.prompt.as_str().into();
    }
    if let Some(suffix) = &args.suffix {
        request["suffix"] = suffix.as_str().into();
    }
    if let Some(seed) = args.seed {
        request["seed"] = seed.into();
    }
    if !args.stop.is_empty() {
        request["stop"] = args.stop.as_slice().into();
    }
    request
}

/// The figures side by side, then each output.
fn table(reply: &Reply) -> String {
    let header = ["arm", "model", "in", "cached", "out", "TTFT ms", "TPOT ms", "total ms", "logprob", "agreement"];
    let rows: Vec<[String; 10]> = reply.arms.iter().map(row).collect();
    let mut text = columns(&header, &rows, 2);
    // Writing to a string cannot fail.
    let _ = writeln!(text, "seed {}", reply.seed);
    for arm in &reply.arms {
        let said = arm.error.as_ref().map_or(&arm.text, |error| &error.message);
        let _ = writeln!(text, "\n── {} ──\n{}", arm.name, said.trim_end_matches('\n'));
    }
    text
}

fn row(arm: &ArmReply) -> [String; 10] {
    let number =
        |number: Option<f64>, digits: usize| number.map_or("-".to_owned(), |number| format!("{number:.digits$}"));
    let count =
        |count: fn(&UsageReply) -> usize| arm.usage.as_ref().map_or("-".to_owned(), |usage| count(usage).to_string());
    let model = if arm.error.is_some() { "error" } else { &arm.model };
    [
        arm.name.clone(),
        model.to_owned(),
        count(|usage| usage.prompt_tokens),
        count(|usage| usage.prompt_tokens_details.cached_tokens),
        count(|usage| usage.completion_tokens),
        number(arm.ttft_ms, 0),
        number(arm.tpot_ms, 1),
        number(arm.total_ms, 0),
        number(arm.logprob, 2),
        number(arm.agreement, 2),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arm(text: &str) -> Result<Value, String> {
        text.parse().map(|Arm(fields)| Value::Object(fields))
    }

    #[test]
    fn an_arm_is_a_name_a_model_and_what_else_the_request_says() {
        assert_eq!(arm("base="), Ok(json!({"name": "base"})));
        assert_eq!(arm("tuned=q:0.5b-conala"), Ok(json!({"name": "tuned", "model": "q:0.5b-conala"})));
        let icl = json!({"store": "py@2", "k": 3, "select": "bm25"});
        let expected = json!({"name": "shots", "model": "m", "icl": icl, "prompt_format": "chat"});
        assert_eq!(arm("shots=m,select=bm25,icl=py@2@3,format=chat"), Ok(expected));
        for bad in ["base", "a=m,icl=py", "a=m,icl=py@x", "a=m,select=bm25", "a=m,k=3", "a=m,"] {
            assert!(arm(bad).is_err(), "{bad}");
        }
        for twice in ["icl=py@1,icl=sh@2", "icl=py@1,select=bm25,select=fixed", "format=chat,format=paper-v2"] {
            assert!(arm(&format!("a=m,{twice}")).unwrap_err().contains("is said twice"), "{twice}");
        }
    }

    #[test]
    fn the_table_has_a_line_for_every_arm_and_an_error_in_place_of_its_text() {
        let usage = json!({"prompt_tokens": 12, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}});
        let reply = json!({"seed": 7, "arms": [
            {"name": "base", "model": "m", "text": "one\n\n", "usage": usage, "ttft_ms": 10.4, "tpot_ms": null,
             "total_ms": 31.6, "logprob": -1.234, "agreement": 1.0},
            {"name": "longer name", "error": {"message": "no such model"}}]});
        let expected = "\
arm          model  in  cached  out  TTFT ms  TPOT ms  total ms  logprob  agreement
base         m      12       0    3       10        -        32    -1.23       1.00
longer name  error   -       -    -        -        -         -        -          -
seed 7

── base ──
one

── longer name ──
no such model
";
        assert_eq!(table(&serde_json::from_value(reply).unwrap()), expected);
    }
}

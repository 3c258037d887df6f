//! TLS: who is served, who is left, and which files are refused.

mod tiny;

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use lorry::app::App;
use lorry::config::{Config, Overrides};
use lorry::http;
use lorry::model::spec::Architecture;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ALL_VERSIONS, ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};

use tiny::TinyModel;

const HOST: &str = "localhost";
/// Of a connection, in the system.
const BUFFER_BYTES: u32 = 4096;
const LONG: Duration = Duration::from_secs(60);

/// A folder with `certificate.pem` and `key.pem`.
struct Identity {
    dir: TempDir,
    certificate: CertificateDer<'static>,
}

impl Identity {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed([HOST.to_owned()]).unwrap();
        std::fs::write(dir.path().join("certificate.pem"), cert.pem()).unwrap();
        std::fs::write(dir.path().join("key.pem"), signing_key.serialize_pem()).unwrap();
        Self { dir, certificate: cert.der().clone() }
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// `settings` is more of the inside of `[server]`.
    fn config(&self, settings: &str) -> Config {
        config(&self.file("certificate.pem"), &self.file("key.pem"), settings, self.dir.path())
    }

    /// Trusts the certificate and would rather speak HTTP/2.
    fn client(&self, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_protocol_versions(versions).unwrap();
        let mut client = builder.with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Arc::new(client)
    }

    /// What a client says first.
    fn client_hello(&self) -> Vec<u8> {
        let name = ServerName::try_from(HOST).unwrap();
        let mut hello = Vec::new();
        ClientConnection::new(self.client(ALL_VERSIONS), name).unwrap().write_tls(&mut hello).unwrap();
        hello
    }

    async fn connect(&self, address: SocketAddr) -> TlsStream<TcpStream> {
        self.encrypt(TcpStream::connect(address).await.unwrap(), ALL_VERSIONS).await
    }

    async fn encrypt(&self, stream: TcpStream, versions: &[&'static SupportedProtocolVersion]) -> TlsStream<TcpStream> {
        let name = ServerName::try_from(HOST).unwrap();
        TlsConnector::from(self.client(versions)).connect(name, stream).await.unwrap()
    }

    /// The whole reply, whose end is said and not cut.
    async fn get(&self, address: SocketAddr, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n");
        ask(self.connect(address).await, &request).await
    }
}

fn config(certificate: &str, key: &str, settings: &str, dir: &Path) -> Config {
    let (model, file) = (dir.join("tiny.gguf"), dir.join("lorry.toml"));
    std::fs::write(&file, format!("[server]\ntls_certificate = {certificate:?}\ntls_key = {key:?}\n{settings}"))
        .unwrap();
    let model = Some(model.to_string_lossy().into_owned());
    let overrides = Overrides { model, adapters: Some(String::new()), ..Overrides::default() };
    Config::load(Some(&file), &overrides).unwrap()
}

/// A server whose model is still loading, for as long as the result is kept.
async fn loading(config: &Config) -> (SocketAddr, http::Server) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (listener.local_addr().unwrap(), http::Server::start(listener, &config.server).unwrap())
}

/// With a tiny model; what the system keeps of a reply is little.
async fn serving(identity: &Identity, settings: &str) -> SocketAddr {
    TinyModel::new(Architecture::Qwen2, GgmlDType::Q8_0, 1).write(&identity.dir.path().join("tiny.gguf"));
    let config = identity.config(settings);
    let app = tokio::task::spawn_blocking(|| App::load(config).unwrap()).await.unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(BUFFER_BYTES).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(16).unwrap();
    let address = listener.local_addr().unwrap();
    let server = http::Server::start(listener, &app.state.config.server).unwrap();
    assert_eq!(server.scheme, "https");
    tokio::spawn(server.serve(app.state, std::future::pending()));
    address
}

async fn ask(mut stream: TlsStream<TcpStream>, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    timeout(LONG, stream.read_to_string(&mut reply)).await.expect("the reply ends").unwrap();
    reply
}

fn post(num_choices: usize, max_tokens: usize) -> String {
    let body = json!({"prompt": "def f(x):", "n": num_choices, "max_tokens": max_tokens, "ignore_eos": true,
        "logprobs": 20, "stream": true});
    let body = body.to_string();
    let length = body.len();
    format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
}

async fn open(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

/// All that the server says until it closes.
async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A connection that is closed with something unread may be reset.
    let _ = timeout(LONG, stream.read_to_end(&mut bytes)).await.expect("the server closes the connection");
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_trusts_the_certificate_is_served_and_streamed_to() {
    let identity = Identity::new();
    let address = serving(&identity, "").await;
    for version in [&TLS12, &TLS13] {
        let stream = identity.encrypt(TcpStream::connect(address).await.unwrap(), &[version]).await;
        let session = stream.get_ref().1;
        assert_eq!(
            (session.alpn_protocol(), session.protocol_version()),
            (Some(&b"http/1.1"[..]), Some(version.version))
        );
        let reply = ask(stream, &post(1, 20)).await;
        assert!(reply.starts_with("HTTP/1.1 200 ") && reply.contains("data: [DONE]"), "{reply}");
        assert_eq!(reply.matches("\"finish_reason\":\"length\"").count(), 1, "{reply}");
    }
    let health = identity.get(address, "/health").await;
    assert!(health.starts_with("HTTP/1.1 200 ") && health.contains(r#""status":"ok""#), "{health}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_of_its_reply_is_left() {
    let identity = Identity::new();
    let address = serving(&identity, "write_timeout_seconds = 1").await;
    let num_choices = 8;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(BUFFER_BYTES).unwrap();
    let mut silent = identity.encrypt(socket.connect(address).await.unwrap(), ALL_VERSIONS).await;
    silent.write_all(post(num_choices, 200).as_bytes()).await.unwrap();
    let cancelled = format!(r#"lorry_requests_total{{adapter="base",finish_reason="cancelled"}} {num_choices}"#);
    let left = async {
        while !identity.get(address, "/metrics").await.contains(&cancelled) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, left).await.expect("who does not read holds nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_speak_tls_is_closed() {
    let identity = Identity::new();
    let (address, _server) = loading(&identity.config("header_timeout_seconds = 600")).await;
    for request in ["GET /health HTTP/1.1\r\nhost: x\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\0\0\0\0\0\0\0\0"] {
        let said = rest(&mut open(address, request.as_bytes()).await).await;
        assert!(!String::from_utf8_lossy(&said).contains("HTTP"), "{request:?}: {said:?}");
    }
    assert!(identity.get(address, "/health").await.contains("Loading model"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_does_not_go_on_ends_the_connection_and_so_does_one_in_drops() {
    let identity = Identity::new();
    let (address, _server) = loading(&identity.config("header_timeout_seconds = 1")).await;
    let hello = identity.client_hello();
    for bytes in [&[][..], &hello[..hello.len() / 2], &hello] {
        let said = rest(&mut open(address, bytes).await).await;
        assert_eq!(said.is_empty(), bytes.len() < hello.len(), "{} bytes were sent", bytes.len());
    }
    // Whole, but nothing comes after it.
    let mut silent = identity.connect(address).await;
    rest(silent.get_mut().0).await;
    let mut dripping = open(address, &[]).await;
    let drops = async {
        for byte in hello.chunks(1).cycle() {
            if dripping.write_all(byte).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(LONG, drops).await.expect("every drop does not begin the time anew");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_takes_a_connection_and_gives_it_back() {
    let identity = Identity::new();
    let (address, _server) = loading(&identity.config("max_connections = 1\nheader_timeout_seconds = 600")).await;
    let hello = identity.client_hello();
    let half_open = open(address, &hello[..hello.len() / 2]).await;
    let refused = identity.get(address, "/v1/models").await;
    assert!(refused.contains("every connection of the server is taken"), "{refused}");
    assert!(identity.get(address, "/health").await.contains("Loading model"), "probes are answered");
    drop(half_open);
    let free = async { while !identity.get(address, "/v1/models").await.contains("Loading model") {} };
    timeout(LONG, free).await.expect("the place is free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_does_not_wait_for_a_handshake() {
    let identity = Identity::new();
    let (address, server) = loading(&identity.config("header_timeout_seconds = 600")).await;
    let mut half_open = open(address, &identity.client_hello()).await;
    // It is under way: the server has said its part.
    half_open.read_u8().await.unwrap();
    drop(server);
    rest(&mut half_open).await;
}

#[tokio::test]
async fn files_that_are_missing_or_garbled_or_of_two_identities_are_refused_by_name() {
    let (identity, other) = (Identity::new(), Identity::new());
    let (certificate, key) = (identity.file("certificate.pem"), identity.file("key.pem"));
    let garbled = |name: &str, text: String| {
        std::fs::write(identity.dir.path().join(name), text).unwrap();
        identity.file(name)
    };
    let pem = std::fs::read_to_string(&certificate).unwrap();
    let cut = garbled("cut", pem[..pem.len() - 20].to_owned());
    let letters = garbled("letters", pem.replace("MII", "M!I"));
    let chain = garbled("chain", pem.clone() + &pem[..pem.len() / 2]);
    let section = |kind: &str| format!("-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n");
    let zeros = garbled("zeros", section("CERTIFICATE") + &section("PRIVATE KEY"));
    let encrypted = garbled("encrypted", section("ENCRYPTED PRIVATE KEY"));
    let (empty, dir) = (garbled("empty", String::new()), identity.dir.path().to_string_lossy().into_owned());
    let (absent, nothing) = (identity.file("absent.pem"), String::new());
    let (both_certificate, both_key) = (["server.tls_certificate ", &certificate], ["server.tls_key ", &key]);
    let listener = || TcpListener::bind("127.0.0.1:0");
    for (certificate, key, words) in [
        (&certificate, &nothing, ["server.tls_key is empty", "server.tls_certificate"]),
        (&nothing, &key, ["server.tls_certificate is empty", "server.tls_key"]),
        (&absent, &key, ["server.tls_certificate ", &absent]),
        (&dir, &key, ["server.tls_certificate ", &dir]),
        (&empty, &key, ["server.tls_certificate ", &empty]),
        (&cut, &key, ["server.tls_certificate ", &cut]),
        (&letters, &key, ["server.tls_certificate ", &letters]),
        (&chain, &key, ["server.tls_certificate ", &chain]),
        (&zeros, &key, ["server.tls_certificate ", &zeros]),
        (&key, &key, ["there is no certificate in it", &key]),
        (&certificate, &absent, ["server.tls_key ", &absent]),
        (&certificate, &dir, ["server.tls_key ", &dir]),
        (&certificate, &empty, ["server.tls_key ", &empty]),
        (&certificate, &zeros, ["server.tls_key ", &zeros]),
        (&certificate, &encrypted, ["not encrypted", &encrypted]),
        (&certificate, &certificate, ["there is no private key in it", &certificate]),
        (&certificate, &other.file("key.pem"), both_certificate),
        (&other.file("certificate.pem"), &key, both_key),
    ] {
        let config = config(certificate, key, "", identity.dir.path());
        let error = http::Server::start(listener().await.unwrap(), &config.server).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    }
}

#[test]
fn the_files_are_read_before_the_model() {
    let identity = Identity::new();
    let model = identity.file("no-model.gguf");
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorry"));
    command.args(["serve", "--port", "0", "--model", &model]).env("LORRY__SERVER__TLS_KEY", identity.file("key.pem"));
    let told = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let absent = identity.file("absent.pem");
    let error = told(command.env("LORRY__SERVER__TLS_CERTIFICATE", &absent));
    assert!(error.contains(&absent) && !error.contains(&model), "{error}");
    let error = told(command.env("LORRY__SERVER__TLS_CERTIFICATE", identity.file("certificate.pem")));
    assert!(error.contains(&model), "{error}");
}

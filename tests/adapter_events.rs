//! What happens to adapters, as it is told: in order, once, to whoever may know of it, and never lost in silence.

mod adapter_server;
mod folder;
mod tiny;

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use folder::Fixture;
use lorry::adapter::registry::{AdapterChange, AdapterEvent, Tier};
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

use adapter_server::{ADMIN, Server, write_adapter};

const LONG: Duration = Duration::from_secs(60);

/// The next event of a registry that tells all.
async fn told(events: &mut Receiver<Arc<AdapterEvent>>) -> AdapterEvent {
    let event = timeout(LONG, events.recv()).await.expect("it is told").unwrap();
    AdapterEvent::clone(&event)
}

#[tokio::test]
async fn the_life_of_an_adapter_is_told_in_its_order() {
    let fixture = Fixture::new(&["a", "b"]).with_room_for(1);
    let registry = fixture.registry();
    let mut events = registry.events();
    let generation_of = |name: &str| registry.status(name).unwrap().generation;
    let first = generation_of("a");

    registry.acquire("b").await.unwrap();
    let evicted = told(&mut events).await;
    assert_eq!(
        (evicted.name.as_str(), evicted.change, evicted.generation),
        ("a", AdapterChange::Evicted, first.clone())
    );
    let loaded = told(&mut events).await;
    assert_eq!((loaded.name.as_str(), &loaded.generation), ("b", &generation_of("b")));
    assert!(matches!(loaded.change, AdapterChange::Loaded { tier: Tier::Host, seconds } if seconds > 0.0));
    assert!(loaded.time >= evicted.time);

    // There is room for one of its generations.
    fixture.write("b", 2.0);
    let evicted = told(&mut events).await;
    assert_eq!((evicted.change, &evicted.generation), (AdapterChange::Evicted, &loaded.generation));
    let replaced = told(&mut events).await;
    assert_eq!((&replaced.name, &replaced.generation), (&loaded.name, &generation_of("b")));
    let previous_generation = loaded.generation.unwrap();
    assert_ne!(replaced.generation.as_ref(), Some(&previous_generation));
    assert_eq!(replaced.change, AdapterChange::Replaced { previous_generation });
    let loaded = told(&mut events).await;
    assert_eq!((loaded.change.as_str(), &loaded.generation), ("loaded", &replaced.generation));

    fs::write(fixture.path("b/adapter.toml"), "promt = 'x'").unwrap();
    let refused = told(&mut events).await;
    assert!(matches!(&refused.change, AdapterChange::Refused { reason } if reason.contains("promt")), "{refused:?}");
    fs::remove_dir_all(fixture.path("b")).unwrap();
    assert_eq!(told(&mut events).await.change, AdapterChange::Removed);

    fixture.write("c", 1.0);
    let registered = told(&mut events).await;
    assert_eq!((registered.name.as_str(), registered.change), ("c", AdapterChange::Registered));
}

#[tokio::test]
async fn a_listener_who_falls_behind_is_told_how_many_it_has_missed() {
    const NUM_LOADS: u64 = 800;
    let fixture = Fixture::new(&["a", "b"]).with_room_for(1);
    let registry = fixture.registry();
    let mut events = registry.events();
    for turn in 0..NUM_LOADS {
        registry.acquire(if turn % 2 == 0 { "b" } else { "a" }).await.unwrap();
    }
    let RecvError::Lagged(num_missed) = events.recv().await.unwrap_err() else { panic!("the registry is there") };
    let mut num_kept = 0;
    while events.try_recv().is_ok() {
        num_kept += 1;
    }
    assert_eq!(num_missed + num_kept, 2 * NUM_LOADS);
    assert!(num_kept > 0 && num_missed > 0, "{num_kept} {num_missed}");
}

/// A stream of events over HTTP.
struct Events {
    response: Response,
    /// Bytes, as what is read may end within a character.
    unparsed: Vec<u8>,
}

impl Events {
    async fn of(server: &Server, key: &str) -> Self {
        let request = server.request(Method::GET, "/v1/adapters/events").bearer_auth(key);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, unparsed: Vec::new() }
    }

    async fn next(&mut self) -> Value {
        loop {
            if let Some(event_len) = self.unparsed.windows(2).position(|bytes| bytes == b"\n\n") {
                let event: Vec<u8> = self.unparsed.drain(..event_len + 2).collect();
                match parsed(std::str::from_utf8(&event[..event_len]).unwrap()) {
                    Some(event) => return event,
                    None => continue,
                }
            }
            let chunk = timeout(LONG, self.response.chunk()).await.expect("there is more").unwrap().unwrap();
            self.unparsed.extend_from_slice(&chunk);
        }
    }
}

/// The data of an event, whose name is in it; `None` for a comment.
fn parsed(event: &str) -> Option<Value> {
    let (name, data) = event.strip_prefix("event: ")?.split_once("\ndata: ").unwrap();
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!(data["event"], name);
    Some(data)
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_streamed_to_the_keys_that_open_their_adapters() {
    let keys = "[[server.keys]]\nname = 'one'\nkey = 'one'\nadapters = ['c*']";
    let server = Server::start(&format!("{ADMIN}{keys}")).await;
    let refused = server.request(Method::GET, "/v1/adapters/events").send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    let (mut all, mut own) = (Events::of(&server, "admin").await, Events::of(&server, "one").await);
    let put = async |name: &str, path: &str| {
        let (status, body) = server.admin(Method::PUT, &format!("/v1/adapters/{name}"), json!({"path": path})).await;
        assert!(status.is_success(), "{body}");
        body["generation"].clone()
    };
    put("hidden", "a").await;
    let generations = [put("c", "a").await, put("c", "b").await];
    assert_eq!(server.admin(Method::DELETE, "/v1/adapters/hidden", json!({})).await.0, StatusCode::NO_CONTENT);
    write_adapter(&server.root().join(".new"), 4);
    fs::write(server.root().join(".new/adapter.toml"), "promt = 'x'").unwrap();
    fs::rename(server.root().join(".new"), server.root().join("cut")).unwrap();

    let mut seen = Vec::new();
    while seen.last().is_none_or(|event: &Value| event["event"] != "refused") {
        seen.push(all.next().await);
    }
    let names: Vec<_> = seen.iter().map(|e| (e["name"].as_str().unwrap(), e["event"].as_str().unwrap())).collect();
    let expected = [
        ("hidden", "registered"),
        ("hidden", "loaded"),
        ("c", "registered"),
        ("c", "loaded"),
        ("c", "replaced"),
        ("c", "loaded"),
        ("hidden", "removed"),
        ("cut", "registered"),
        ("cut", "refused"),
    ];
    assert_eq!(names, expected);
    for expected in seen.iter().filter(|event| event["name"] != "hidden") {
        assert_eq!(own.next().await, *expected);
    }
    let [_, _, _, first, replaced, second, _, _, refused] = &seen[..] else { unreachable!("they are nine") };
    assert_eq!([&first["generation"], &second["generation"]], generations.each_ref());
    assert_eq!((&first["model"], &first["tier"]), (&json!("tiny-c"), &json!("host")));
    assert!(first["seconds"].as_f64() > Some(0.0), "{first}");
    assert_eq!((&replaced["generation"], &replaced["previous_generation"]), (&generations[1], &generations[0]));
    assert!(refused["reason"].as_str().unwrap().contains("promt"), "{refused}");
    let now = chrono::Utc::now();
    for event in &seen {
        let time = chrono::DateTime::parse_from_rfc3339(event["time"].as_str().unwrap()).unwrap();
        assert!((now - time.to_utc()).num_seconds() < 600, "{event}");
    }
    let (status, error) = server.admin(Method::PUT, "/v1/adapters/events", json!({"path": "a"})).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_keeps_nobody_waiting_and_is_told_what_it_missed() {
    const NUM_FOLDERS: usize = 3000;
    /// So that the reasons together are more than the system keeps of a connection.
    const NAME_LEN: usize = 8_000;
    let server = Server::start(ADMIN).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut unread = socket.connect(server.address()).await.unwrap();
    unread.write_all(b"GET /v1/adapters/events HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut response = Vec::new();
    while !response.ends_with(b"\r\n\r\n") {
        response.push(unread.read_u8().await.unwrap());
    }

    let mut all = Events::of(&server, "admin").await;
    let manifest = format!("{} = 1", "x".repeat(NAME_LEN));
    for index in 0..NUM_FOLDERS {
        let staged = server.root().join(".new");
        fs::create_dir_all(&staged).unwrap();
        fs::write(staged.join("adapter_config.json"), "{}").unwrap();
        fs::write(staged.join("adapter.toml"), &manifest).unwrap();
        fs::rename(staged, server.root().join(format!("x{index}"))).unwrap();
    }
    fs::remove_dir_all(server.root().join("a")).unwrap();
    let (mut num_read, mut num_missed) = (0, 0);
    loop {
        let event = all.next().await;
        match event["event"].as_str().unwrap() {
            "removed" => break,
            "missed" => num_missed += event["num_missed"].as_u64().unwrap(),
            _ => num_read += 1,
        }
    }
    assert_eq!(num_read + num_missed, 2 * NUM_FOLDERS as u64);

    const LAST: &[u8] = b"event: removed";
    let mut has_all = false;
    while !has_all {
        let seen_len = response.len().saturating_sub(LAST.len());
        let num_read = timeout(LONG, unread.read_buf(&mut response)).await.expect("there is more").unwrap();
        assert!(num_read > 0, "it ended");
        has_all = response[seen_len..].windows(LAST.len()).any(|bytes| bytes == LAST);
    }
    // The end may lie within a character, and chunks too.
    let response = String::from_utf8_lossy(&response);
    let (mut num_read, mut num_missed) = (0, 0);
    // Between events stand the sizes of chunks.
    for (name, data) in response.split("event: ").skip(1).filter_map(|event| event.split_once("\ndata: ")) {
        if name == "missed" {
            let data: Value = serde_json::from_str(data.lines().next().unwrap()).unwrap();
            num_missed += data["num_missed"].as_u64().unwrap();
        } else {
            num_read += 1;
        }
    }
    assert!(num_missed > 0, "all of it was kept: this shows nothing");
    // The last one may not have come whole.
    assert!((0..=1).contains(&(2 * NUM_FOLDERS as u64 + 1 - num_read - num_missed)), "{num_read} {num_missed}");
}

//! That `/openapi.json` says what the server does: which routes there are, and what the parsers take of each request.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;

use super::contract::{Operation, concrete, documented, fault_of_error, sent, with_parameters};
use super::*;
use crate::http::compare::ALTERNATIVES;
use crate::http::sampling::LENGTH_NAMES;

/// Of types that no field takes all of.
fn probes() -> [Value; 5] {
    [json!([[]]), json!({"?": 1}), json!(1e18), json!("?"), json!(true)]
}

/// `example`, where `name` is `value` and nothing else says the same in another way.
fn with(example: &Value, name: &str, value: &Value) -> Value {
    let mut body = example.clone();
    let others = ALTERNATIVES.iter().filter(|names| names.contains(&name)).flat_map(|names| names.iter());
    // The length of a response, and the place of Ollama's.
    let of_length = ["max_output_tokens", "options"].iter().filter(|_| LENGTH_NAMES.contains(&name));
    if let Value::Object(fields) = &mut body {
        others.chain(of_length).for_each(|other| _ = fields.remove(*other));
    }
    body[name] = value.clone();
    body
}

impl Operation {
    /// Whether the field `name` of `value` is refused by its name, in one of the examples.
    async fn refuses(&self, server: &Server, name: &str, value: &Value) -> bool {
        for example in &self.examples {
            let mut beside_all = example.clone();
            beside_all[name] = value.clone();
            for body in [with(example, name, value), beside_all] {
                let reply = self.send(server, &body).await;
                let is_named = ["`", ".", "["].iter().any(|end| reply.text.contains(&format!("`{name}{end}")));
                if reply.status == StatusCode::BAD_REQUEST && is_named {
                    return true;
                }
            }
        }
        false
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_and_method_is_documented_and_nothing_else_is() {
    let server = Server::quick().await;
    let mut by_path: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for Operation { method, path, .. } in documented(&server).await {
        by_path.entry(path).or_default().insert(method.to_string());
    }
    let debug = format!("{:?}", super::super::routes(&server.state));
    let route = Regex::new(r#"RouteId\(\d+\): "(/[^"]*)""#).unwrap();
    let served = route.captures_iter(&debug).map(|found| found[1].replace("{*", "{"));
    let served: BTreeSet<String> = served.filter(|path| !path.contains("__private__")).collect();
    assert!(served.len() > 60, "{served:?}");
    for path in by_path.keys() {
        assert!(served.contains(path), "{path} is documented and not served");
    }
    for path in &served {
        let twin = path.strip_prefix("/v1").map_or(format!("/v1{path}"), str::to_owned);
        let documented = by_path.get(path).or(by_path.get(&twin)).unwrap_or_else(|| panic!("{path} is not documented"));
        for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] {
            let response = server.request(method.parse().unwrap(), &concrete(path)).send().await.unwrap();
            let is_served = response.status() != StatusCode::METHOD_NOT_ALLOWED;
            let is_documented = documented.contains(method) || method == "HEAD" && documented.contains("GET");
            assert_eq!(is_served, is_documented, "{method} {path}");
            if !is_served {
                let allowed = response.headers()["allow"].to_str().unwrap();
                let allowed: BTreeSet<&str> = allowed.split(',').filter(|method| *method != "HEAD").collect();
                let documented: BTreeSet<&str> =
                    documented.iter().map(String::as_str).filter(|method| *method != "HEAD").collect();
                assert_eq!(allowed, documented, "{method} {path}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_the_document_is_read_by_its_route() {
    let server = Server::able().await;
    let mut ignored = Vec::new();
    for operation in &documented(&server).await {
        for (name, schema) in &operation.properties {
            // Refused or not by what else the request says.
            if schema.as_object().unwrap().keys().all(|key| key == "description") {
                continue;
            }
            let mut is_read = false;
            for probe in probes() {
                is_read = is_read || operation.refuses(&server, name, &probe).await;
            }
            if !is_read {
                ignored.push(format!("{} {name}", operation.name()));
            }
        }
    }
    assert!(ignored.is_empty(), "{ignored:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_that_a_route_reads_is_in_the_document() {
    let server = Server::able().await;
    let names = names_in_source();
    assert!(names.len() > 300, "{names:?}");
    let mut read = Vec::new();
    for operation in documented(&server).await.iter().filter(|operation| !operation.is_closed) {
        let undocumented: Vec<_> = names.iter().filter(|name| !operation.properties.contains_key(*name)).collect();
        for example in operation.examples.iter().filter(|example| example.is_object()) {
            let expected = operation.send(&server, example).await.status;
            // As many as a body has room for.
            for some in undocumented.chunks(200) {
                let mut body = example.clone();
                some.iter().for_each(|name| body[name.as_str()] = json!([[]]));
                let reply = operation.send(&server, &body).await;
                if reply.status != expected {
                    read.push(format!("{}: {}", operation.name(), reply.text));
                }
            }
        }
    }
    assert!(read.is_empty(), "{read:#?}");
}

/// What may be the name of a field: every word in quotes in the sources of this interface.
fn names_in_source() -> BTreeSet<String> {
    fn read(folder: &Path, sources: &mut String) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, sources);
            } else {
                sources.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    let mut sources = String::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http"), &mut sources);
    let word = Regex::new(r#""([a-z][a-z0-9_]*)""#).unwrap();
    word.captures_iter(&sources).map(|found| found[1].to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bounds_of_the_document_are_those_of_the_parsers() {
    let server = Server::able().await;
    let (mut num_bounds, mut wrong) = (0, Vec::new());
    for operation in &documented(&server).await {
        for (name, schema) in &operation.properties {
            for (bound, beyond) in [("minimum", -1.0), ("maximum", 1.0)] {
                let Some(value) = schema[bound].as_f64() else { continue };
                let place = format!("{}: {name} {bound} {value}", operation.name());
                // What is next to the limits of 64 bits is those.
                if value.abs() < 2f64.powi(53) {
                    num_bounds += 1;
                    if !operation.refuses(&server, name, &json!(value + beyond)).await {
                        wrong.push(format!("{place} is not the last"));
                    }
                }
                // Some of the examples have a tighter bound: beams are fewer than choices.
                let mut is_taken = false;
                for example in &operation.examples {
                    let reply = operation.send(&server, &with(example, name, &schema[bound])).await;
                    is_taken = is_taken || !reply.text.contains(&format!("`{name}` must be from"));
                }
                if !is_taken {
                    wrong.push(format!("{place} is refused"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(num_bounds > 300, "{num_bounds}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_of_the_document_are_served() {
    let server = Server::able().await;
    for operation in &documented(&server).await {
        // These name what is not there.
        let path = operation.path.as_str();
        let is_lacking = ["adapter", "/feedback", "/events", "/show", "/fine_tuning", "/promotions"]
            .iter()
            .any(|part| path.contains(part));
        for example in operation.examples.iter().filter(|_| !is_lacking) {
            let reply = operation.send(&server, example).await;
            assert_eq!(reply.status, StatusCode::OK, "{path} {example}: {}", reply.text);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_in_a_path_that_is_no_text_is_refused_in_the_words_of_its_interface() {
    let server = Server::able().await;
    let mut num_paths = 0;
    for operation in documented(&server).await.iter().filter(|operation| operation.path.contains('{')) {
        let path = with_parameters(&operation.path, "%FF");
        let reply = sent(server.request(operation.method.clone(), &path).bearer_auth("admin").body("{}")).await;
        let is_refused = reply.status.is_client_error() || operation.has_status(501);
        assert!(is_refused, "{}: {} {}", operation.name(), reply.status, reply.text);
        if operation.method != Method::HEAD {
            assert_eq!(fault_of_error(&operation.path, &reply), None, "{}", operation.name());
            num_paths += 1;
        }
    }
    assert!(num_paths > 15, "{num_paths}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_is_in_the_words_of_its_interface() {
    let server = Server::able().await;
    for operation in &documented(&server).await {
        let request = || operation.request(&server);
        let mut refusals = vec![(request().header("content-encoding", "br"), 415)];
        if !operation.examples.is_empty() {
            refusals.push((request().body("{"), 400));
            refusals.push((request().body("\"a\""), 400));
            refusals.push((request().body(format!("\"{}\"", "a".repeat(20_000))), 413));
        }
        if operation.has_status(403) {
            let name = concrete(&operation.path);
            refusals.push((server.request(operation.method.clone(), &name).body("{}"), 401));
        }
        if operation.properties.contains_key("model") && !operation.path.ends_with("/tokenize") {
            let mut body = operation.examples[0].clone();
            body["model"] = json!("nothing");
            refusals.push((request().body(body.to_string()), 404));
        }
        // Not those that are answered in one way whatever is sent.
        for (request, status) in refusals {
            let reply = sent(request).await;
            let place = format!("{} {status}", operation.name());
            if !operation.has_status(501) || operation.has_status(400) {
                assert_eq!(reply.status, status, "{place}: {}", reply.text);
            }
            assert_eq!(operation.fault(&reply), None, "{place}");
        }
        // Not of the operation, but in its words.
        for path in [concrete(&operation.path), concrete(&operation.path) + "/a/b"] {
            let reply = sent(server.request(Method::TRACE, &path)).await;
            assert!([404, 405].contains(&reply.status.as_u16()), "{path}: {}", reply.text);
            assert_eq!(fault_of_error(&operation.path, &reply), None);
        }
    }
}

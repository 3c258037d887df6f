//! What machines ask, and the page.

use serde_json::{Value, json};

use super::document::{Access, Document, JSON, Operation, TEXT};
use super::schema::{item, required_text};

const TAG: &str = "Probes";
const HTML: &str = "text/html";

pub fn describe(document: &mut Document) {
    let health = item(json!({"status": {"const": "ok"}, "device": required_text()}), &["status", "device"]);
    let get = |path, summary| Operation::get(path, TAG, summary).access(Access::Anyone);
    document.add(get("/health", "Whether requests have a chance").answers(200, "They have.", &[(JSON, health)]));
    let metrics = get("/metrics", "Prometheus metrics; without a key, of no adapter where clients need one");
    document.add(metrics.answers(200, "In its text format.", &[(TEXT, required_text())]).refuses(&[401]));
    document.add(get("/openapi.json", "This document").answers(
        200,
        "OpenAPI 3.1.",
        &[(JSON, json!({"type": "object"}))],
    ));
    let page = |path, summary, contents: &[(&str, Value)]| {
        get(path, summary).answers(200, "The file.", contents).answers(304, "The browser has it.", &[])
    };
    document.add(page(
        "/",
        "The page; to what is no browser, one line",
        &[(HTML, required_text()), (TEXT, required_text())],
    ));
    let types = ["text/css", "text/javascript", "image/svg+xml", HTML].map(|media_type| (media_type, required_text()));
    document.add(page("/assets/{name}", "A file of the page", &types).refuses(&[400, 404]));
}

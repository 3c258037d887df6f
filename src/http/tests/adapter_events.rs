//! Who listens to what happens to adapters does not keep the server from stopping.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_adapter_events_ends_when_the_server_stops() {
    let server = Server::quick().await;
    let listening = server.request(Method::GET, "/v1/adapters/events").send().await.unwrap();
    assert_eq!(listening.status(), StatusCode::OK);
    server.shutdown.send(()).unwrap();
    assert_eq!(listening.text().await.unwrap(), "");
    server.served.await.unwrap().unwrap();
}

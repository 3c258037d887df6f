//! Accepts connections, so many and so patiently as the configuration says. When all are taken, further ones are still
//! asked what they want: probes are answered, so that a full server is not taken for a dead one.

mod client;
mod tls;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
#[cfg(unix)]
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;

use super::{PROBES, tidy};
use crate::config::ServerConfig;
use client::{ClientStream, Clock, Patience};

pub use tls::{TlsError, acceptor as tls};

/// Connections beyond the limit that are held to hear what they want; the oldest makes room for the next. More than are
/// accepted in one go, so that each is heard before it has to.
const MAX_UNADMITTED: usize = 256;
/// For such a connection to say it.
const UNADMITTED_PATIENCE: Duration = Duration::from_secs(1);
/// Connections that the system keeps until they are accepted; it may keep fewer. A client that finds no room among them tries
/// again after a second.
#[cfg(unix)]
const BACKLOG: i32 = 4096;
/// Of a reply that the system keeps until its client takes it. Else it is up to 4 MiB for each connection, of which a third has to
/// be taken before the system says that anything was: who reads slowly but steadily would look like one who does not.
#[cfg(unix)]
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// Open files of everything but connections: models, adapters, databases.
#[cfg(unix)]
const OTHER_FILES: usize = 256;
/// Of a connection's buffer, so of a header and of what is read of a body before others have their turn.
const BUFFER_BYTES: usize = 64 << 10;
/// Before the next try, when the system refuses a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where requests go.
#[derive(Debug, Clone)]
pub struct Routers {
    pub admitted: Router,
    /// Those of connections beyond the limit that are no probes.
    pub beyond: Router,
}

/// Serves until `shutdown` resolves, and returns when every connection has ended. A request goes to the router that
/// there is when it comes. With `tls`, connections are encrypted.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    routers: watch::Receiver<Routers>,
    config: ServerConfig,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let patience = Patience {
        header: Duration::from_secs(config.header_timeout_seconds),
        keep_alive: Duration::from_secs(config.keep_alive_seconds),
        write: Duration::from_secs(config.write_timeout_seconds),
    };
    lengthen_backlog(&listener);
    bound_send_buffers(&listener);
    allow_open_files(config.max_connections);
    let places = Arc::new(Semaphore::new(config.max_connections));
    let connections = GracefulShutdown::new();
    let (accepting, stopping) = watch::channel(());
    let mut unadmitted: VecDeque<AbortHandle> = VecDeque::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("a connection cannot be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // A token is worth a packet. Where this fails, the connection is already gone.
        let _ = stream.set_nodelay(true);
        let place = places.clone().try_acquire_owned().ok();
        let is_admitted = place.is_some();
        let (watcher, stopping) = (connections.watcher(), stopping.clone());
        let connection = Connection { routers: routers.clone(), place, patience, watcher };
        let task = match tls.clone() {
            None => tokio::spawn(connection.run(stream)),
            Some(tls) => tokio::spawn(connection.run_encrypted(stream, tls, stopping)),
        };
        if !is_admitted {
            unadmitted.retain(|task| !task.is_finished());
            if unadmitted.len() == MAX_UNADMITTED {
                unadmitted.pop_front().iter().for_each(AbortHandle::abort);
            }
            unadmitted.push_back(task.abort_handle());
        }
    }
    drop((listener, accepting));
    connections.shutdown().await;
    Ok(())
}

/// Of a listener that has one already: the standard library's has room for 128.
#[cfg(unix)]
fn lengthen_backlog(listener: &TcpListener) {
    if let Err(error) = rustix::net::listen(listener, BACKLOG) {
        tracing::warn!("many connections at once may have to wait: {error}");
    }
}

#[cfg(not(unix))]
fn lengthen_backlog(_: &TcpListener) {}

/// Of the connections to come, which take it from their listener.
#[cfg(unix)]
fn bound_send_buffers(listener: &TcpListener) {
    if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(listener, SEND_BUFFER_BYTES) {
        tracing::warn!("clients that do not read may take much memory: {error}");
    }
}

#[cfg(not(unix))]
fn bound_send_buffers(_: &TcpListener) {}

/// A connection is an open file, of which many systems allow 1024 unless asked for more.
#[cfg(unix)]
fn allow_open_files(max_connections: usize) {
    let wanted = u64::try_from(max_connections + MAX_UNADMITTED + OTHER_FILES).unwrap_or(u64::MAX);
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return;
    }
    let allowed = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(allowed), ..limit });
    if allowed < wanted || raised.is_err() {
        tracing::warn!("{wanted} open files are needed for server.max_connections, the system allows fewer");
    }
}

#[cfg(not(unix))]
fn allow_open_files(_: usize) {}

struct Connection {
    routers: watch::Receiver<Routers>,
    /// `None` where all are taken.
    place: Option<OwnedSemaphorePermit>,
    patience: Patience,
    watcher: Watcher,
}

impl Connection {
    async fn run(self, stream: TcpStream) {
        let clock = self.start_clock();
        let stream = ClientStream::new(stream, clock.clone());
        self.serve(stream, clock).await;
    }

    /// The clock runs from before the handshake, which ends with `stopping`: nobody has asked for anything yet.
    async fn run_encrypted(self, stream: TcpStream, tls: TlsAcceptor, mut stopping: watch::Receiver<()>) {
        let clock = self.start_clock();
        let stream = ClientStream::new(stream, clock.clone());
        let encrypted = tokio::select! {
            encrypted = tls.accept(stream) => encrypted,
            _ = stopping.changed() => return,
        };
        match encrypted {
            Ok(stream) => self.serve(stream, clock).await,
            Err(error) => tracing::debug!("a connection has ended in its TLS handshake: {error}"),
        }
    }

    fn start_clock(&self) -> Clock {
        let mut patience = self.patience;
        if self.place.is_none() {
            patience.header = patience.header.min(UNADMITTED_PATIENCE);
        }
        Clock::start(patience)
    }

    async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin + 'static, clock: Clock) {
        let Self { routers, place, watcher, .. } = self;
        let is_admitted = place.is_some();
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let answering = clock.answer();
            let is_served = is_admitted || PROBES.contains(&tidy(request.uri().path()).as_str());
            let router = {
                let routers = routers.borrow();
                if is_served { routers.admitted.clone() } else { routers.beyond.clone() }
            };
            let reply = TowerToHyperService::new(router).call(request);
            async move { Ok::<_, Infallible>(answering.with(reply.await?)) }
        });
        let stream = TokioIo::new(stream);
        let mut http = http1::Builder::new();
        let connection = http.max_buf_size(BUFFER_BYTES).keep_alive(is_admitted).serve_connection(stream, service);
        // Clients that leave, or are left, are no news.
        if let Err(error) = watcher.watch(connection).await {
            tracing::debug!("a connection has ended: {error}");
        }
    }
}

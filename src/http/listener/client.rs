//! A connection that ends when its client keeps it waiting: for a request, for the rest of its header, or to take more of a
//! reply. How long a body may take is for who reads it.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum::response::Response;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::super::held_body::HeldBody;

/// How long a client may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a whole header, and for the first request of a connection.
    pub header: Duration,
    /// For the next request.
    pub keep_alive: Duration,
    /// To take any more of a reply.
    pub write: Duration,
}

/// What a connection waits for; shared by its two ends, the stream and the replies.
#[derive(Debug, Clone)]
pub struct Clock {
    patience: Patience,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// Of the connection's task.
    reader: Option<Waker>,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Nothing of a request has come.
    Idle {
        until: Instant,
    },
    Header {
        until: Instant,
    },
    /// A request is being answered.
    Busy,
}

impl Clock {
    pub fn start(patience: Patience) -> Self {
        let phase = Phase::Idle { until: Instant::now() + patience.header };
        Self { patience, state: Arc::new(Mutex::new(State { phase, reader: None })) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A header has come whole: its request is being answered until the result is dropped.
    #[must_use]
    pub fn answer(&self) -> Answering {
        self.state().phase = Phase::Busy;
        Answering(self.clone())
    }

    fn received(&self) {
        let mut state = self.state();
        if let Phase::Idle { .. } = state.phase {
            state.phase = Phase::Header { until: Instant::now() + self.patience.header };
        }
    }

    /// When to give up a read that waits; `None` while there is nothing to wait for.
    fn deadline(&self, waker: &Waker) -> Option<Instant> {
        let mut state = self.state();
        match &mut state.reader {
            Some(reader) => reader.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        match state.phase {
            Phase::Idle { until } | Phase::Header { until } => Some(until),
            Phase::Busy => None,
        }
    }
}

#[derive(Debug)]
pub struct Answering(Clock);

impl Answering {
    /// The reply, whose body, sent or not, ends the answer.
    pub fn with(self, reply: Response) -> hyper::Response<HeldBody<Self>> {
        reply.map(|body| HeldBody::new(body, self))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.phase = Phase::Idle { until: Instant::now() + self.0.patience.keep_alive };
        // A read that waits has been told of no deadline.
        state.reader.take().into_iter().for_each(Waker::wake);
    }
}

#[derive(Debug)]
pub struct ClientStream {
    stream: TcpStream,
    clock: Clock,
    timer: Pin<Box<Sleep>>,
    /// Runs while the client takes nothing of what is to be written.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl ClientStream {
    pub fn new(stream: TcpStream, clock: Clock) -> Self {
        Self { stream, clock, timer: Box::pin(sleep_until(Instant::now())), stalled: None }
    }

    /// What came of a write, or its end when the client has taken nothing for too long.
    fn poll_taken(&mut self, written: Poll<io::Result<usize>>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.clock.patience.write;
        ready!(self.stalled.get_or_insert_with(|| Box::pin(sleep(patience))).as_mut().poll(cx));
        // What the client has not taken would else be kept for it, by the system, long after the end.
        let _ = self.stream.set_zero_linger();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let num_before = buffer.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut this.stream).poll_read(cx, buffer) {
            if buffer.filled().len() > num_before {
                this.clock.received();
            }
            return Poll::Ready(read);
        }
        let Some(deadline) = this.clock.deadline(cx.waker()) else { return Poll::Pending };
        if this.timer.deadline() != deadline {
            this.timer.as_mut().reset(deadline);
        }
        ready!(this.timer.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.poll_taken(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.poll_taken(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpSocket};
    use tokio::time::timeout;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    async fn connection(header: Duration, keep_alive: Duration) -> (TcpStream, ClientStream, Clock) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let clock = Clock::start(Patience { header, keep_alive, write: LONG });
        let (stream, _) = listener.accept().await.unwrap();
        (client, ClientStream::new(stream, clock.clone()), clock)
    }

    async fn read(stream: &mut ClientStream) -> Result<u8, io::ErrorKind> {
        timeout(LONG, stream.read_u8()).await.expect("it ends").map_err(|error| error.kind())
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_or_half_of_it_is_left() {
        let (_client, mut stream, _) = connection(SHORT, LONG).await;
        assert_eq!(read(&mut stream).await, Err(io::ErrorKind::TimedOut));
        let (mut client, mut stream, _) = connection(SHORT, LONG).await;
        client.write_all(b"G").await.unwrap();
        assert_eq!(read(&mut stream).await, Ok(b'G'));
        assert_eq!(read(&mut stream).await, Err(io::ErrorKind::TimedOut));
    }

    #[tokio::test]
    async fn while_a_request_is_answered_its_client_may_be_silent_and_then_for_so_long() {
        let (_client, mut stream, clock) = connection(SHORT, SHORT).await;
        let answering = clock.answer();
        let reading = tokio::spawn(async move { read(&mut stream).await });
        tokio::time::sleep(10 * SHORT).await;
        assert!(!reading.is_finished(), "a reply is not cut");
        // A read that waits is told.
        drop(answering);
        assert_eq!(reading.await.unwrap(), Err(io::ErrorKind::TimedOut));
    }

    /// The system keeps little of what is on the way, so that it shows soon what the client takes.
    async fn narrow_connection(write: Duration) -> (TcpStream, ClientStream) {
        const BUFFER_BYTES: u32 = 4096;
        let (server, client) = (TcpSocket::new_v4().unwrap(), TcpSocket::new_v4().unwrap());
        server.set_send_buffer_size(BUFFER_BYTES).unwrap();
        client.set_recv_buffer_size(BUFFER_BYTES).unwrap();
        server.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = server.listen(1).unwrap();
        let client = client.connect(listener.local_addr().unwrap()).await.unwrap();
        let clock = Clock::start(Patience { header: LONG, keep_alive: LONG, write });
        let (stream, _) = listener.accept().await.unwrap();
        (client, ClientStream::new(stream, clock))
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_of_its_reply_is_left_and_told() {
        let (mut client, mut stream) = narrow_connection(10 * SHORT).await;
        let written = timeout(LONG, stream.write_all(&[0; 1 << 20])).await.expect("it ends");
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(stream);
        let read = timeout(LONG, client.read_to_end(&mut Vec::new())).await.expect("the rest is not kept for it");
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_client_that_reads_slowly_but_steadily_gets_everything() {
        const NUM_BYTES: usize = 200_000;
        let write = 25 * SHORT;
        let (mut client, mut stream) = narrow_connection(write).await;
        let writing = tokio::spawn(async move { stream.write_all(&[0; NUM_BYTES]).await });
        let begun = Instant::now();
        let mut num_read = 0;
        while num_read < NUM_BYTES {
            num_read += timeout(LONG, client.read(&mut [0; 2000])).await.expect("there is more").unwrap();
            tokio::time::sleep(SHORT / 2).await;
        }
        writing.await.unwrap().unwrap();
        assert!(begun.elapsed() > write, "no longer than one may take for nothing: this shows nothing");
    }

    #[tokio::test]
    async fn an_answer_ends_with_its_body() {
        let (_client, _stream, clock) = connection(LONG, LONG).await;
        let reply = clock.answer().with(Response::new(Body::from("x")));
        assert!(matches!(clock.state().phase, Phase::Busy));
        drop(reply);
        assert!(matches!(clock.state().phase, Phase::Idle { .. }));
    }
}

//! Serves the metrics: HTTP/1.1, `GET /metrics` and nothing else, a connection for each answer.
//!
//! A scraper that is slow, silent or hostile costs its own connection for a few seconds, of which there are few. It shares the
//! control's thread, never a shard.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nbd_server::{Access, ListenAddress, Listener, StdListener};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::control::patiently;
use super::metrics;
use super::service::Service;
use crate::cli::Failure;

/// How long a scraper may take to ask, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A longer head of a request is refused.
const MOST_HEAD_BYTES: usize = 8 << 10;
/// Scrapers at once; others wait.
const MOST_CONNECTIONS: usize = 16;

/// An address where metrics are to be had, bound before anything is made.
#[derive(Debug)]
pub(super) struct Scraped {
    address: ListenAddress,
    listener: StdListener,
    /// Takes the file of a unix socket away.
    _file: Listener,
}

impl Scraped {
    /// Listens there.
    ///
    /// # Errors
    /// Where the address cannot be had.
    pub(super) fn bind(address: &ListenAddress, access: &Access) -> anyhow::Result<Self> {
        let cannot = || {
            let what = format!("cannot listen for scrapers of metrics at {address}");
            Failure::new(what, "name another address with --metrics, unix:PATH or tcp:HOST:PORT")
        };
        if !matches!(address, ListenAddress::Unix(_) | ListenAddress::Tcp { .. }) {
            return Err(cannot().into());
        }
        // They are numbers, and no disks: TCP needs no TLS.
        let access = Access { insecure: true, ..access.clone() };
        let bound = Listener::bind(address, &access).map_err(|error| cannot().because(error))?;
        let file = bound.into_iter().next().ok_or_else(cannot)?;
        let listener = file.to_std().map_err(|error| cannot().because(error))?;
        Ok(Self { address: file.address().clone(), listener, _file: file })
    }

    /// Where it is, with the port that the system chose.
    pub(super) fn url(&self) -> String {
        match &self.listener {
            StdListener::Unix(_) => self.address.to_string(),
            StdListener::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("http://{address}/metrics"),
                Err(_) => "http:///metrics".to_owned(),
            },
        }
    }

    /// Answers whoever asks, until it is dropped. Called within a runtime.
    pub(super) async fn serve(&self, service: Arc<Service>) -> io::Result<()> {
        let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        match &self.listener {
            StdListener::Unix(listener) => {
                let listener = tokio::net::UnixListener::from_std(listener.try_clone()?)?;
                answer_all(|| listener.accept(), &service, &places).await;
            }
            StdListener::Tcp(listener) => {
                let listener = tokio::net::TcpListener::from_std(listener.try_clone()?)?;
                answer_all(|| listener.accept(), &service, &places).await;
            }
        }
        Ok(())
    }
}

async fn answer_all<S, A, F>(accept: impl Fn() -> F, service: &Arc<Service>, places: &Arc<Semaphore>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = io::Result<(S, A)>>,
{
    loop {
        let Ok(place) = Arc::clone(places).acquire_owned().await else { return };
        let (stream, _) = patiently(&accept).await;
        tokio::spawn(answer(stream, Arc::clone(service), place));
    }
}

async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    service: Arc<Service>,
    _place: OwnedSemaphorePermit,
) {
    let Ok(Some(head)) = tokio::time::timeout(PATIENCE, read_head(&mut stream)).await else { return };
    let answer = respond(&head, || metrics::render(&service));
    let _ = tokio::time::timeout(PATIENCE, async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    })
    .await;
}

/// The head of a request, to its empty line; what there is of it where it is too long. `None` where there is none.
async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    let mut part = [0; 1024];
    loop {
        let count = stream.read(&mut part).await.ok()?;
        head.extend_from_slice(&part[..count]);
        let is_whole =
            head.windows(4).any(|end| end == b"\r\n\r\n") || head.windows(2).any(|end| end == b"\n\n");
        if is_whole || head.len() > MOST_HEAD_BYTES {
            return Some(head);
        }
        if count == 0 {
            return None;
        }
    }
}

/// The answer to a request with this head.
fn respond(head: &[u8], render: impl FnOnce() -> String) -> String {
    const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";
    let first = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let words: Vec<&str> =
        std::str::from_utf8(first).map(|line| line.split_ascii_whitespace().collect()).unwrap_or_default();
    let (status, kind, body, with_body) = match words.as_slice() {
        _ if head.len() > MOST_HEAD_BYTES => (
            "431 Request Header Fields Too Large",
            "text/plain",
            "the request is too long\n".to_owned(),
            true,
        ),
        [method @ ("GET" | "HEAD"), path, version] if version.starts_with("HTTP/1.") => {
            let with_body = *method == "GET";
            if path.split('?').next() == Some("/metrics") {
                ("200 OK", METRICS, render(), with_body)
            } else {
                ("404 Not Found", "text/plain", "metrics are at /metrics\n".to_owned(), with_body)
            }
        }
        [_, _, version] if version.starts_with("HTTP/1.") => {
            ("405 Method Not Allowed\r\nAllow: GET, HEAD", "text/plain", "only GET\n".to_owned(), true)
        }
        _ => ("400 Bad Request", "text/plain", "this is no HTTP/1.1\n".to_owned(), true),
    };
    let len = body.len();
    let body = if with_body { body.as_str() } else { "" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_get_metrics_is_answered_with_metrics() {
        let first = |head: &str| {
            let answer = respond(head.as_bytes(), || "x 1\n".to_owned());
            answer.lines().next().unwrap().to_owned()
        };
        assert_eq!(first("GET /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 200 OK");
        assert_eq!(first("GET /metrics?x=1 HTTP/1.0\r\n\r\n"), "HTTP/1.1 200 OK");
        assert_eq!(first("GET / HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 Not Found");
        assert_eq!(first("POST /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
        assert_eq!(first("NBDMAGIC\n\n"), "HTTP/1.1 400 Bad Request");
        assert_eq!(first(""), "HTTP/1.1 400 Bad Request");
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "y".repeat(MOST_HEAD_BYTES));
        assert_eq!(first(&long), "HTTP/1.1 431 Request Header Fields Too Large");
        let head = respond(b"HEAD /metrics HTTP/1.1\r\n\r\n", || "x 1\n".to_owned());
        assert!(head.contains("Content-Length: 4\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    }
}

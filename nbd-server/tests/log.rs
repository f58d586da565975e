//! What the log says of clients: a line for each kind of trouble, whoever has it, and no more than that.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use block::ErrorKind;
use common::{Client, MemoryDisk, Served, wish};
use nbd_server::log_queue::LogQueue;
use nbd_server::{Limits, ServerOptions};
use proto::wire::{CommandFlags, CommandKind, ReplyStyle};

/// The log of this program, as at the default level.
struct Log {
    queue: LogQueue,
    text: Arc<Mutex<String>>,
}

impl Log {
    fn start() -> &'static Self {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let text = Arc::new(Mutex::new(String::new()));
            let to = Arc::clone(&text);
            let queue = LogQueue::new(move |line| {
                to.lock().expect("nobody panics with it").push_str(&String::from_utf8_lossy(line))
            });
            tracing_subscriber::fmt()
                .with_max_level(tracing::Level::WARN)
                .with_writer(queue.clone())
                .with_ansi(false)
                .init();
            Self { queue, text }
        })
    }

    fn lines_with(&self, words: &str) -> Vec<String> {
        assert!(self.queue.flush(Duration::from_secs(60)));
        self.text
            .lock()
            .expect("nobody panics with it")
            .lines()
            .filter(|line| line.contains(words))
            .map(str::to_owned)
            .collect()
    }
}

fn with_limits(limits: Limits) -> ServerOptions {
    ServerOptions { limits, ..ServerOptions::default() }
}

#[test]
fn requests_that_fail_are_one_line_for_all_connections() {
    let log = Log::start();
    let served = Served::new(MemoryDisk::new(1 << 20), ServerOptions::default());
    served.disk.fail(ErrorKind::Io);
    for _ in 0..30 {
        let mut client = served.client();
        for _ in 0..3 {
            assert!(client.read(0, 4096).result.is_err());
        }
        client.disconnect();
    }
    let lines = log.lines_with("a request failed");
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("disk0") && lines[0].contains("WARN"), "{lines:#?}");
    assert!(log.lines_with("further failures").is_empty());
    served.end();
}

#[test]
fn a_client_that_is_closed_for_stalling_is_named_with_the_option_that_changes_it() {
    let log = Log::start();
    let limits = Limits { stall_timeout: Duration::from_millis(50), ..Limits::default() };
    let served = Served::new(MemoryDisk::new(1 << 20), with_limits(limits));
    let mut client = served.client();
    let header = client.header(CommandKind::Write, CommandFlags::NONE, 0, 1 << 20);
    // The header, and never its payload.
    let header = client.encode(&header);
    client.socket.write_all(&header).unwrap();
    client.assert_closed();
    served.wait_for(|stats| stats.connections == 0);
    let lines = log.lines_with("a stalled client's connection was closed");
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("disk0") && lines[0].contains("--stall-timeout"), "{lines:#?}");
    served.end();
}

#[test]
fn handshakes_that_take_too_long_are_one_line_with_the_option_that_changes_it() {
    let log = Log::start();
    let limits = Limits { handshake_timeout: Duration::from_millis(50), ..Limits::default() };
    let served = Served::new(MemoryDisk::new(1 << 20), with_limits(limits));
    let mut slow: Vec<_> = (0..3).map(|_| UnixStream::connect(&served.path).unwrap()).collect();
    for slow in &mut slow {
        // The greeting, and the end.
        let mut greeting = Vec::new();
        slow.read_to_end(&mut greeting).unwrap();
    }
    let lines = log.lines_with("a handshake took too long");
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("--handshake-timeout"), "{lines:#?}");
    drop(Client::connect(&served.path, wish("disk0", ReplyStyle::Simple)));
    served.end();
}

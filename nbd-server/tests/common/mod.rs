//! A disk in memory that can be made to wait and to fail, and a client of our own that blocks.
#![allow(dead_code, unused_imports, reason = "each test uses a part of it")]

mod client;
mod conversation;
mod credentials;
mod disk;
mod vast;

use std::path::PathBuf;
use std::sync::Arc;

use block::{Engine, IoEngine};
pub(crate) use client::{Client, assert_closed, begin_hand_made, option, wish};
pub(crate) use conversation::{
    connect_patiently, conversation, descriptors, leave, more_descriptors, other_endings, talk,
};
pub(crate) use credentials::{Authority, Dir, Flaw};
pub(crate) use disk::MemoryDisk;
use nbd_server::{Export, ListenAddress, Server, ServerHandle, ServerOptions, Stats};
use proto::wire::ReplyStyle;
pub(crate) use vast::{Asked, VastDisk};

/// A server of one disk in memory, on a unix socket in a directory of its own.
pub(crate) struct Served {
    pub(crate) disk: Arc<MemoryDisk>,
    pub(crate) path: PathBuf,
    pub(crate) handle: ServerHandle,
    _dir: tempfile::TempDir,
}

impl Served {
    pub(crate) fn new(disk: MemoryDisk, options: ServerOptions) -> Self {
        Self::with(disk, options, 1, engine(), |server| server)
    }

    pub(crate) fn with(
        disk: MemoryDisk,
        options: ServerOptions,
        shards: usize,
        engine: Engine,
        adapt: impl FnOnce(Server) -> Server,
    ) -> Self {
        let dir = tempfile::tempdir().expect("a directory for the socket");
        let path = dir.path().join("s");
        let disk = Arc::new(disk);
        let exports = vec![
            Export { dirty_bitmap: Some("restore".to_owned()), ..Export::new("disk0", disk.clone()) },
            Export { read_only: true, ..Export::new("frozen", disk.clone()) },
        ];
        let server = Server::bind(&[ListenAddress::Unix(path.clone())], exports, options)
            .expect("the path is free and the names are good");
        let handle = adapt(server).run(shards, engine).expect("threads can be had");
        Self { disk, path, handle, _dir: dir }
    }

    pub(crate) fn client(&self) -> Client {
        self.client_with(ReplyStyle::Structured)
    }

    pub(crate) fn client_with(&self, style: ReplyStyle) -> Client {
        Client::connect(&self.path, wish("disk0", style)).expect("the server takes us")
    }

    pub(crate) fn simple_client(&self) -> Client {
        self.client_with(ReplyStyle::Simple)
    }

    /// Waits until the server's numbers are as `condition` wants them.
    pub(crate) fn wait_for(&self, condition: impl Fn(Stats) -> bool) {
        while !condition(self.handle.stats()) {
            std::thread::yield_now();
        }
    }

    /// Whether the server still does its work, and nothing of earlier connections is left.
    pub(crate) fn check_health(&self) {
        let mut client = self.client();
        assert_eq!(client.read(0, 4096).result, Ok(()));
        client.disconnect();
        self.wait_for(|stats| {
            stats == Stats { connections: 0, half_open: 0, operations: 0, memory_bytes: 0 }
        });
    }

    pub(crate) fn end(self) {
        self.handle.shutdown();
        self.handle.join().expect("no thread panicked");
        assert_eq!(self.disk.handles(), 0, "every handle of the device was closed");
    }
}

/// Every kind of replies.
pub(crate) const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

/// What this machine allows.
pub(crate) fn engine() -> Engine {
    Engine::choose(IoEngine::Auto).expect("auto always finds one")
}

pub(crate) fn engines() -> [Engine; 2] {
    [engine(), Engine::THREADS]
}

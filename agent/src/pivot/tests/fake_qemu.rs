//! A QEMU that is made up: its nodes, its jobs, and what goes wrong at each of its commands.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::pivot::qmp::{Monitor, QmpError};

pub(super) const SIZE: u64 = 1 << 20;

/// What goes wrong at a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mishap {
    /// QEMU refuses it.
    Refused,
    /// QEMU does it, and nothing is heard of it, nor of anything after it.
    DoneSilently,
    /// Nothing is done and nothing is heard.
    Lost,
}

#[derive(Clone, Debug)]
pub(super) struct FakeNode {
    pub(super) driver: &'static str,
    pub(super) file: String,
    pub(super) child: Option<String>,
    pub(super) size: u64,
    pub(super) read_only: bool,
}

/// A QEMU with one drive.
pub(super) struct FakeQemu {
    pub(super) nodes: BTreeMap<String, FakeNode>,
    /// The drive's uppermost node.
    pub(super) root: String,
    pub(super) job: bool,
    /// How many commands were run.
    pub(super) commands: Vec<String>,
    pub(super) mishap: Option<(usize, Mishap)>,
    pub(super) is_silent: bool,
    pub(super) process: u32,
    pub(super) opened: Vec<File>,
    /// What it opens by whatever path.
    pub(super) opens_instead: Option<PathBuf>,
    pub(super) target_size: Option<u64>,
    /// Nobody serves the export any more.
    pub(super) is_export_gone: bool,
    pub(super) yanked: Vec<String>,
}

impl FakeQemu {
    pub(super) fn new(socket: &Path, raw: Option<&str>, nbd: &str) -> Self {
        let mut nodes = BTreeMap::new();
        let file = format!("nbd+unix:///disk0?socket={}", socket.display());
        let node =
            |driver, child| FakeNode { driver, file: file.clone(), child, size: SIZE, read_only: false };
        nodes.insert(nbd.to_owned(), node("nbd", None));
        if let Some(raw) = raw {
            nodes.insert(raw.to_owned(), node("raw", Some(nbd.to_owned())));
        }
        Self {
            nodes,
            root: raw.unwrap_or(nbd).to_owned(),
            job: false,
            commands: Vec::new(),
            mishap: None,
            is_silent: false,
            process: std::process::id(),
            opened: Vec::new(),
            opens_instead: None,
            target_size: None,
            is_export_gone: false,
            yanked: Vec::new(),
        }
    }

    /// What the drive leads to.
    pub(super) fn bottom(&self) -> &str {
        let mut name = &self.root;
        while let Some(child) = &self.nodes[name].child {
            name = child;
        }
        self.nodes[name].driver
    }

    pub(super) fn users(&self, name: &str) -> usize {
        let parents = self.nodes.values().filter(|node| node.child.as_deref() == Some(name)).count();
        parents + usize::from(self.root == name) + usize::from(self.job && name.starts_with("lifeboot-raw"))
    }

    fn do_it(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        match command {
            "query-block" => Ok(json!([{ "device": "drive0", "qdev": "/machine/peripheral/disk-a/virtio-backend",
                "inserted": { "node-name": self.root } }])),
            "query-named-block-nodes" => Ok(self.nodes.iter().map(|(name, node)| json!({
                "node-name": name, "drv": node.driver, "file": node.file, "ro": node.read_only, "detect_zeroes": "off",
                "cache": { "direct": false, "no-flush": false }, "image": { "virtual-size": node.size } })).collect()),
            "x-debug-query-block-graph" => Ok(self.graph()),
            "query-block-jobs" => Ok(if self.job {
                json!([{ "device": "lifeboot-move-0123456789ab", "ready": true }])
            } else {
                json!([])
            }),
            "blockdev-add" => self.add(arguments),
            "blockdev-del" => {
                let name = text(&arguments["node-name"]);
                if !self.nodes.contains_key(&name) {
                    return Err(format!("Failed to find node with node-name='{name}'"));
                }
                if self.users(&name) > 0 {
                    return Err(format!("Block device {name} is in use"));
                }
                self.nodes.remove(&name);
                Ok(json!({}))
            }
            "yank" => {
                let name = text(&arguments["instances"][0]["node-name"]);
                assert_eq!(self.users(&name), 0, "the guest reads through {name}");
                self.yanked.push(name);
                Ok(json!({}))
            }
            "blockdev-reopen" => {
                let options = &arguments["options"][0];
                let name = text(&options["node-name"]);
                if name.starts_with('#') {
                    return Err("Cannot change the option 'node-name'".into());
                }
                let old = self.nodes.get_mut(&name).unwrap().child.replace(text(&options["file"])).unwrap();
                if old.starts_with('#') {
                    self.nodes.remove(&old);
                }
                Ok(json!({}))
            }
            "blockdev-mirror" => {
                assert_eq!((&arguments["sync"], &arguments["copy-mode"]), (&json!("none"), &json!("write-blocking")));
                assert_eq!(text(&arguments["device"]), self.root);
                self.job = true;
                Ok(json!({}))
            }
            "block-job-cancel" => {
                self.job = false;
                Ok(json!({}))
            }
            "block-job-complete" => {
                self.job = false;
                let mut old = Some(std::mem::replace(&mut self.root, "lifeboot-raw-0123456789ab".into()));
                while let Some(name) = old.filter(|name| name.starts_with('#')) {
                    old = self.nodes.remove(&name).unwrap().child;
                }
                Ok(json!({}))
            }
            other => Err(format!("The command {other} has not been found")),
        }
    }

    /// A node is flushed before it goes.
    fn waits_for_its_export(&self, command: &str, arguments: &Value) -> bool {
        let name = arguments["node-name"].as_str().unwrap_or_default();
        let is_nbd = || self.nodes.get(name).is_some_and(|node| node.driver == "nbd");
        let was_yanked = || self.yanked.iter().any(|yanked| yanked == name);
        command == "blockdev-del" && self.is_export_gone && is_nbd() && self.users(name) == 0 && !was_yanked()
    }

    fn add(&mut self, options: &Value) -> Result<Value, String> {
        let text = |name: &str| options[name].as_str().unwrap_or_default().to_owned();
        let name = text("node-name");
        if self.nodes.contains_key(&name) {
            return Err(format!("Duplicate nodes with node-name='{name}'"));
        }
        let node = if options["driver"] == "raw" {
            FakeNode {
                driver: "raw",
                file: text("file"),
                child: Some(text("file")),
                size: SIZE,
                read_only: false,
            }
        } else {
            let path = self.opens_instead.clone().unwrap_or_else(|| text("filename").into());
            let file = File::open(path).map_err(|error| error.to_string())?;
            let size = self.target_size.unwrap_or(file.metadata().unwrap().len());
            self.opened.push(file);
            FakeNode { driver: "file", file: text("filename"), child: None, size, read_only: false }
        };
        self.nodes.insert(name, node);
        Ok(json!({}))
    }

    pub(super) fn graph(&self) -> Value {
        let ids: BTreeMap<&String, usize> =
            self.nodes.keys().enumerate().map(|(id, name)| (name, id + 10)).collect();
        let mut nodes = vec![json!({ "id": 1, "type": "block-backend", "name": "drive0" })];
        let mut edges = vec![json!({ "parent": 1, "child": ids[&self.root], "name": "root" })];
        for (name, node) in &self.nodes {
            nodes.push(json!({ "id": ids[name], "type": "block-driver", "name": name }));
            if let Some(child) = &node.child {
                edges.push(json!({ "parent": ids[name], "child": ids[child], "name": "file" }));
            }
        }
        if self.job {
            nodes.push(json!({ "id": 2, "type": "block-job", "name": "lifeboot-move-0123456789ab" }));
            for child in [self.root.as_str(), "lifeboot-raw-0123456789ab"] {
                edges.push(json!({ "parent": 2, "child": ids[&child.to_owned()], "name": "job" }));
            }
        }
        json!({ "nodes": nodes, "edges": edges })
    }
}

impl Monitor for FakeQemu {
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let silent = || QmpError::Silent("/qmp".into());
        if self.is_silent {
            return Err(silent());
        }
        let refused = |reason| QmpError::Refused { command: command.to_owned(), reason };
        let number = self.commands.len();
        self.commands.push(command.to_owned());
        match self.mishap.filter(|(at, _)| *at == number) {
            // It waits for its export to come back, before it does anything else.
            _ if self.waits_for_its_export(command, &arguments) => {
                self.is_silent = true;
                Err(silent())
            }
            Some((_, Mishap::Refused)) => Err(refused("it does not like it".into())),
            Some((_, mishap)) => {
                self.is_silent = true;
                if mishap == Mishap::DoneSilently {
                    self.do_it(command, &arguments).map_err(refused)?;
                }
                Err(silent())
            }
            None => self.do_it(command, &arguments).map_err(refused),
        }
    }

    fn process(&self) -> Option<u32> {
        Some(self.process)
    }

    fn pause(&mut self) {}
}

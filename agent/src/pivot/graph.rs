//! QEMU's block nodes as it tells them: which of its drives is on our export, and where a drive is.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::export::Pointed;
use super::qmp::{Monitor, QmpError};
use super::{Home, Whereabouts};

/// A node with its driver, or something that uses nodes.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    id: u64,
    kind: String,
    pub(super) name: String,
    pub(super) driver: String,
    file: String,
    pub(super) direct: bool,
    pub(super) no_flush: bool,
    pub(super) read_only: bool,
    pub(super) detect_zeroes: String,
    pub(super) size: u64,
}

/// All of them, and who uses whom.
#[derive(Clone, Debug)]
pub(super) struct Graph {
    nodes: HashMap<u64, Node>,
    /// Parent, child, and what the child is to the parent.
    edges: Vec<(u64, u64, String)>,
    /// What each drive is called: its names, and the name of its uppermost node.
    drives: Vec<(Vec<String>, String)>,
}

/// How a drive can be moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Give the raw node of this name another child.
    Reopen,
    /// Put the target in the place of the node of this name.
    Replace,
}

/// A drive on our export.
#[derive(Clone, Debug)]
pub(super) struct OnExport {
    /// The node that points to our export.
    pub(super) nbd: Node,
    /// What is to be reopened or replaced.
    pub(super) upper: Node,
    pub(super) way: Way,
}

/// Why no drive was found that can be moved.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotFound {
    #[error("no drive of this QEMU is on the export {export}; its NBD drives: {there}")]
    NotOurs { export: String, there: String },
    #[error("QEMU has no drive, device or node called {0:?}; it has {1}")]
    NoDevice(String, String),
    #[error("the drive {0:?} is not on the export {1}")]
    Elsewhere(String, String),
    #[error("several drives of this QEMU are on the export: {0}")]
    Several(String),
    #[error("on top of the NBD node {0:?} there is {1}, where a raw node or the device itself was expected")]
    Layer(String, String),
}

impl NotFound {
    pub(super) const fn advice(&self) -> &'static str {
        match self {
            Self::NotOurs { .. } => {
                "name the QMP socket of the QEMU whose drive is on the export that `lifeboot status` shows"
            }
            Self::NoDevice(..) => {
                "give --device one of those, or leave it out for the one drive on the export"
            }
            Self::Elsewhere(..) => "leave --device out for the one drive on the export",
            Self::Several(_) => "name one with --device; more than one drive must never use one export",
            Self::Layer(..) => {
                "end what uses the node beside the device (a job, a snapshot, a filter), then run `lifeboot pivot`"
            }
        }
    }
}

impl Graph {
    /// Asks QEMU.
    pub(super) fn ask(monitor: &mut dyn Monitor) -> Result<Self, QmpError> {
        let blocks = match monitor.execute("query-block", json!({})) {
            // The storage daemon has exports where a machine has devices.
            Err(QmpError::Refused { .. }) => monitor.execute("query-block-exports", json!({}))?,
            blocks => blocks?,
        };
        let named = monitor.execute("query-named-block-nodes", json!({"flat": true}))?;
        let graph = monitor.execute("x-debug-query-block-graph", json!({}))?;
        Ok(Self::parse(&blocks, &named, &graph))
    }

    fn parse(blocks: &Value, named: &Value, graph: &Value) -> Self {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let details: HashMap<String, Value> =
            list(named).into_iter().map(|node| (text(&node["node-name"]), node)).collect();
        let nodes = list(&graph["nodes"]).into_iter().map(|node| {
            let (id, name, kind) =
                (node["id"].as_u64().unwrap_or_default(), text(&node["name"]), text(&node["type"]));
            let detail = details.get(&name).filter(|_| kind == "block-driver").cloned().unwrap_or_default();
            let node = Node {
                id,
                kind,
                name,
                driver: text(&detail["drv"]),
                file: text(&detail["file"]),
                direct: detail["cache"]["direct"] == true,
                no_flush: detail["cache"]["no-flush"] == true,
                read_only: detail["ro"] == true,
                detect_zeroes: detail["detect_zeroes"].as_str().unwrap_or("off").to_owned(),
                size: detail["image"]["virtual-size"].as_u64().unwrap_or_default(),
            };
            (id, node)
        });
        let nodes = nodes.collect();
        let id = |value: &Value| value.as_u64().unwrap_or_default();
        let edges = list(&graph["edges"])
            .iter()
            .map(|edge| (id(&edge["parent"]), id(&edge["child"]), text(&edge["name"])))
            .collect();
        let drives = list(blocks)
            .iter()
            .map(|block| {
                let node = block["inserted"]["node-name"].as_str().or_else(|| block["node-name"].as_str());
                let names = ["device", "qdev", "id"].map(|name| text(&block[name]));
                (
                    names.into_iter().filter(|name| !name.is_empty()).collect(),
                    node.unwrap_or_default().to_owned(),
                )
            })
            .collect();
        Self { nodes, edges, drives }
    }

    /// The node of this name.
    pub(super) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.name == name && node.kind == "block-driver")
    }

    /// Whether anything uses the node of this name.
    pub(super) fn is_used(&self, name: &str) -> bool {
        self.node(name).is_some_and(|node| self.parents(node).next().is_some())
    }

    /// The node that uses the node of this name.
    pub(super) fn user(&self, name: &str) -> Option<String> {
        let mut users = self.parents(self.node(name)?);
        users.find(|(user, _)| user.kind == "block-driver").map(|(user, _)| user.name.clone())
    }

    fn parents(&self, node: &Node) -> impl Iterator<Item = (&Node, &str)> {
        let id = node.id;
        let users = self.edges.iter().filter(move |(_, child, _)| *child == id);
        users.filter_map(|(parent, _, role)| Some((self.nodes.get(parent)?, role.as_str())))
    }

    /// Whether a device, an export or a job is somewhere above a node. One that only other nodes use serves nobody: it may be
    /// what a failed hotplug left behind.
    fn serves(&self, node: &Node) -> bool {
        let mut seen = vec![node.id];
        let mut next = 0;
        while let Some(&at) = seen.get(next) {
            next += 1;
            for (parent, child, _) in &self.edges {
                if *child == at && !seen.contains(parent) {
                    if self.nodes.get(parent).is_some_and(|parent| parent.kind != "block-driver") {
                        return true;
                    }
                    seen.push(*parent);
                }
            }
        }
        false
    }

    fn is_below(&self, node: &Node, top: &Node) -> bool {
        let mut seen = vec![top.id];
        let mut next = 0;
        while let Some(&at) = seen.get(next) {
            next += 1;
            for (parent, child, _) in &self.edges {
                if *parent == at && !seen.contains(child) {
                    seen.push(*child);
                }
            }
        }
        seen.contains(&node.id)
    }

    fn of_export(&self, home: &Home<'_>) -> Vec<&Node> {
        let is_ours = |node: &&Node| {
            node.driver == "nbd" && Pointed::parse(&node.file).is_some_and(|pointed| pointed.is_of(home))
        };
        let mut nodes: Vec<&Node> = self.nodes.values().filter(is_ours).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    /// The nodes on our export that nothing uses.
    pub(super) fn left_behind(&self, home: &Home<'_>) -> Vec<String> {
        let ours = self.of_export(home).into_iter().filter(|nbd| self.parents(nbd).next().is_none());
        ours.map(|nbd| nbd.name.clone()).collect()
    }

    /// The drive that is on our export: the one of this name, or the only one.
    pub(super) fn drive(&self, home: &Home<'_>, device: Option<&str>) -> Result<OnExport, NotFound> {
        let mut ours = self.of_export(home);
        if let Some(device) = device {
            let tops = self.tops(device)?;
            let before = ours.len();
            ours.retain(|nbd| tops.iter().any(|top| self.is_below(nbd, top)));
            if ours.is_empty() && before > 0 {
                return Err(NotFound::Elsewhere(device.to_owned(), home.export.to_owned()));
            }
        }
        let nbd = match ours.as_slice() {
            [nbd] => *nbd,
            [] => {
                let others: Vec<&str> = self
                    .nodes
                    .values()
                    .filter(|node| node.driver == "nbd")
                    .map(|node| node.file.as_str())
                    .collect();
                let there = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
                return Err(NotFound::NotOurs { export: home.export.to_owned(), there });
            }
            several => return Err(NotFound::Several(names(several.iter().map(|node| node.name.as_str())))),
        };
        let layer = |what: String| Err(NotFound::Layer(nbd.name.clone(), what));
        let parents: Vec<(&Node, &str)> = self.parents(nbd).collect();
        let (upper, way) = match parents.as_slice() {
            [(raw, "file")] if raw.driver == "raw" => {
                // What QEMU has named by itself it does not reopen.
                (*raw, if raw.name.starts_with('#') { Way::Replace } else { Way::Reopen })
            }
            [(user, "root")] if user.kind == "block-backend" => (nbd, Way::Replace),
            [] => return layer("nothing: no device uses it".to_owned()),
            several => {
                return layer(names(several.iter().map(|(node, _)| {
                    if node.driver.is_empty() { node.kind.as_str() } else { node.driver.as_str() }
                })));
            }
        };
        if self.parents(upper).next().is_none() {
            return layer("no device".to_owned());
        }
        Ok(OnExport { nbd: nbd.clone(), upper: upper.clone(), way })
    }

    /// The nodes that `device` may mean.
    fn tops(&self, device: &str) -> Result<Vec<&Node>, NotFound> {
        let is_named = |name: &String| {
            // `/machine/peripheral/ID/virtio-backend` is the device with that id.
            name == device || name.split('/').any(|part| part == device)
        };
        let of_drives =
            self.drives.iter().filter(|(names, _)| names.iter().any(is_named)).map(|(_, node)| node.as_str());
        let tops: Vec<&Node> = of_drives.chain([device]).filter_map(|name| self.node(name)).collect();
        if tops.is_empty() {
            let there =
                self.drives.iter().flat_map(|(names, node)| names.iter().chain([node])).map(String::as_str);
            return Err(NotFound::NoDevice(device.to_owned(), names(there)));
        }
        Ok(tops)
    }

    /// Where the drive of `home` is.
    pub(super) fn whereabouts(&self, home: &Home<'_>) -> Whereabouts {
        if self.of_export(home).into_iter().any(|nbd| self.serves(nbd)) {
            return Whereabouts::Export;
        }
        let is_home = self.node(&home.file_node()).is_some() && self.is_used(&home.file_node());
        if is_home { Whereabouts::Target } else { Whereabouts::Neither }
    }
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<String> =
        names.filter(|name| !name.is_empty()).map(|name| format!("{name:?}")).collect();
    names.sort();
    names.dedup();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

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
    pub(super) fn serves(&self, node: &Node) -> bool {
        self.above(node).iter().any(|user| user.kind != "block-driver")
    }

    /// Whether a job is somewhere above a node.
    fn has_job(&self, node: &Node) -> bool {
        self.above(node).iter().any(|user| user.kind == "block-job")
    }

    /// Whatever uses a node, and what uses that, and so on.
    fn above(&self, node: &Node) -> Vec<&Node> {
        let mut seen = vec![node.id];
        let mut next = 0;
        while let Some(&at) = seen.get(next) {
            next += 1;
            for (parent, child, _) in &self.edges {
                if *child == at && !seen.contains(parent) {
                    seen.push(*parent);
                }
            }
        }
        seen[1..].iter().filter_map(|id| self.nodes.get(id)).collect()
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

    /// Where the drive of `home` is: the one of this name; without one, whichever is on the export or the target.
    pub(super) fn whereabouts(&self, home: &Home<'_>, device: Option<&str>) -> Whereabouts {
        let file = self.node(&home.file_node());
        // A name that means nothing any more was that of a node that went with the move.
        let tops = device.and_then(|device| self.tops(device).ok()).unwrap_or_default();
        let named: Vec<&Node> = tops.into_iter().filter(|top| self.serves(top)).collect();
        let is_drives = |node: &Node| named.is_empty() || named.iter().any(|top| self.is_below(node, top));
        let is_on_export = self.of_export(home).into_iter().any(|nbd| self.serves(nbd) && is_drives(nbd));
        let was_named = device.is_some() && named.is_empty();
        match file {
            Some(file) if was_named && self.serves(file) && !self.has_job(file) => Whereabouts::Target,
            Some(file) if is_on_export && self.serves(file) => Whereabouts::Both,
            _ if is_on_export => Whereabouts::Export,
            Some(file) if self.is_used(&file.name) && is_drives(file) => Whereabouts::Target,
            _ => Whereabouts::Neither,
        }
    }
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<String> =
        names.filter(|name| !name.is_empty()).map(|name| format!("{name:?}")).collect();
    names.sort();
    names.dedup();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nbd_server::ListenAddress;

    use super::*;

    /// A QEMU whose drives lead through these raw nodes: `(drive, raw node, what is below it)`.
    fn qemu(drives: &[(&str, &str, &str)]) -> Graph {
        let (mut blocks, mut named, mut nodes, mut edges) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (index, (drive, raw, below)) in drives.iter().enumerate() {
            let id = index * 10;
            let driver = if below.starts_with("lifeboot-") { "file" } else { "nbd" };
            blocks.push(json!({ "device": drive, "inserted": { "node-name": raw } }));
            named.push(json!({ "node-name": raw, "drv": "raw", "file": "" }));
            named.push(json!({ "node-name": below, "drv": driver, "file": "nbd+unix:///disk0?socket=/s" }));
            nodes.push(json!({ "id": id + 1, "type": "block-backend", "name": drive }));
            nodes.push(json!({ "id": id + 2, "type": "block-driver", "name": raw }));
            nodes.push(json!({ "id": id + 3, "type": "block-driver", "name": below }));
            edges.push(json!({ "parent": id + 1, "child": id + 2, "name": "root" }));
            edges.push(json!({ "parent": id + 2, "child": id + 3, "name": "file" }));
        }
        Graph::parse(&json!(blocks), &json!(named), &json!({ "nodes": nodes, "edges": edges }))
    }

    #[test]
    fn where_a_drive_is_does_not_depend_on_another_drive_of_the_same_disk() {
        let addresses = [ListenAddress::Unix("/s".into())];
        let home = Home {
            target: Path::new("/t.raw"),
            file: std::fs::metadata("/").unwrap(),
            held: None,
            size: 1 << 20,
            addresses: &addresses,
            export: "disk0",
            epoch: 1,
            is_default: true,
            session: "0123456789abcdef",
        };
        let file = home.file_node();
        let both = qemu(&[("a", "raw-a", &file), ("b", "raw-b", "nbd-b")]);
        for (name, expected) in [
            (Some("a"), Whereabouts::Target),
            (Some("raw-a"), Whereabouts::Target),
            (Some("b"), Whereabouts::Both),
            (Some("nbd-b"), Whereabouts::Both),
            // The node went with the move.
            (Some("nbd-a"), Whereabouts::Target),
            (None, Whereabouts::Both),
        ] {
            assert_eq!(both.whereabouts(&home, name), expected, "{name:?}");
        }
        let neither = qemu(&[("a", "raw-a", "nbd-a"), ("b", "raw-b", "nbd-b")]);
        for name in [None, Some("a"), Some("b")] {
            assert_eq!(neither.whereabouts(&home, name), Whereabouts::Export, "{name:?}");
        }
        let other = qemu(&[("a", "raw-a", &file), ("c", "raw-c", "lifeboot-home-another")]);
        assert_eq!(other.whereabouts(&home, Some("a")), Whereabouts::Target);
        assert_eq!(other.whereabouts(&home, Some("c")), Whereabouts::Neither);
        assert_eq!(other.whereabouts(&home, None), Whereabouts::Target);
    }
}

//! What is said on the control socket: one request, then replies, each a line of JSON.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::pivot::Drive;

/// What an agent is asked. On the wire `request` names the variant: `{"request":"status"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// How far the session of this socket is: a [`crate::status::Status`].
    Status,
    /// How far every session of the agent is: an array of them, in the order of its exports.
    Disks,
    /// Each disk of the agent as a strip of cells: an array of [`Strip`], in the order of its exports.
    Map {
        /// How many cells there may be, up to 4096; a small disk has fewer.
        cells: usize,
    },
    /// Another limit from now on, for all disks of the agent together: [`LimitChanged`].
    Limit {
        /// Bytes a second that the background may take; 0 is no limit.
        rate: u64,
    },
    /// What the guests of this socket's disk read from now on is its boot trace.
    TraceBegin,
    /// What they read until now is its boot trace, and kept: [`crate::trace::KeptTrace`].
    TraceTake,
    /// Make a snapshot of what the guests of this agent wrote: what `lifeboot save --json` prints.
    Save(crate::save::SaveRequest),
    /// Move the machine onto this target: [`crate::live_restore::HandedOver`].
    Pivot {
        /// Which drive of which QEMU.
        drive: Drive,
    },
    /// Let the process that asks take the agent's place: `pid` and `sockets`, and the sockets that clients come to. What is said
    /// after that is in docs/nbd.md, "Hand-over".
    TakeOver {
        /// The ids of all sessions that are to be taken over.
        sessions: Vec<String>,
    },
}

/// The line that a requester may send after its request. On the wire it is `{"request":"cancel"}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub(super) enum Afterwards {
    /// It is not wanted any more. The last reply says what came of it all the same: `done` where it was too late.
    Cancel,
}

/// What comes with the sockets of an agent whose place is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TakeOver {
    /// Its process id.
    pub(crate) pid: u32,
    /// Of each socket, its address, and whether its file goes with the agent that has it.
    pub(crate) sockets: Vec<(String, bool)>,
}

/// A disk as a strip of cells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strip {
    /// The disk's name.
    pub disk: String,
    /// A character for each cell, from the disk's start to its end; see [`crate::live::Cell`].
    pub cells: String,
}

/// What came of [`Request::Limit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitChanged {
    /// Bytes a second before; 0 is no limit.
    pub old: u64,
    /// Bytes a second now.
    pub new: u64,
}

/// What [`Request::Pivot`] tells meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PivotProgress {
    /// What the move waits for.
    pub waiting: String,
}

/// A line of the answer. On the wire `reply` names the variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It is being worked on; said now and then where there is nothing else to say.
    Working,
    /// How far it is; of which shape depends on the request.
    Progress {
        /// What the request's handler tells.
        progress: Value,
    },
    /// The last line: it is done.
    Done {
        /// What was asked for.
        result: Value,
    },
    /// The last line: it was not done.
    Failed {
        /// What failed, on what.
        message: String,
        /// What to do.
        advice: Option<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_wire_is_what_the_documentation_says() {
        let asked: Request = serde_json::from_str(r#"{"request":"status"}"#).unwrap();
        assert_eq!(asked, Request::Status);
        let failed = Reply::Failed { message: "no".into(), advice: None };
        let text = serde_json::to_string(&failed).unwrap();
        assert_eq!(text, r#"{"reply":"failed","message":"no","advice":null}"#);
        assert_eq!(serde_json::to_string(&Afterwards::Cancel).unwrap(), r#"{"request":"cancel"}"#);
        assert_eq!(serde_json::to_string(&Reply::Working).unwrap(), r#"{"reply":"working"}"#);
    }
}

//! What is done for each request. The work itself lives with its subject; see the module above for how one is added.

use serde_json::{Value, to_value};

use super::{Asked, LimitChanged, Request};

/// Does what was asked, and returns what `done` is to carry.
pub(super) async fn answer(request: Request, asked: &Asked) -> anyhow::Result<Value> {
    match request {
        Request::Status => Ok(to_value(asked.service().status(asked.disk()))?),
        Request::Disks => Ok(to_value(asked.service().statuses())?),
        Request::Limit { rate } => {
            let old = asked.service().set_limit(rate);
            Ok(to_value(LimitChanged { old, new: rate })?)
        }
    }
}

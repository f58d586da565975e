//! What is done for each request. The work itself lives with its subject; see the module above for how one is added.

use serde_json::{Value, to_value};

use super::{Asked, Request};

/// Does what was asked, and returns what `done` is to carry.
pub(super) async fn answer(request: Request, asked: &Asked) -> anyhow::Result<Value> {
    match request {
        Request::Status => Ok(to_value(asked.disk().status())?),
    }
}

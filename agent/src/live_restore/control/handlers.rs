//! What is done for each request. The work itself lives with its subject; see the module above for how one is added.

use std::sync::Arc;

use serde_json::{Value, to_value};

use super::{Asked, LimitChanged, PivotProgress, Request, Strip};
use crate::cli::Failure;
use crate::live::Cell;
use crate::live_restore::handover::hand_over;
use crate::trace::TraceKeeper;

/// A strip has no more cells than this.
const MOST_CELLS: usize = 4096;

/// Does what was asked, and returns what `done` is to carry.
pub(super) async fn answer(request: Request, asked: &Asked) -> anyhow::Result<Value> {
    match request {
        Request::Status => Ok(to_value(asked.service().status(asked.disk()))?),
        Request::Disks => Ok(to_value(asked.service().statuses())?),
        Request::Map { cells } => {
            let strips = asked.service().disks().iter().map(|disk| Strip {
                disk: disk.record.disk.clone(),
                cells: disk.session().strip(cells.min(MOST_CELLS)).into_iter().map(Cell::letter).collect(),
            });
            Ok(to_value(strips.collect::<Vec<_>>())?)
        }
        Request::Limit { rate } => {
            let old = asked.service().set_limit(rate);
            Ok(to_value(LimitChanged { old, new: rate })?)
        }
        Request::TraceBegin => {
            trace_of(asked)?.begin(asked.disk().session());
            Ok(Value::Null)
        }
        Request::TraceTake => {
            let (trace, session) = (trace_of(asked)?, Arc::clone(asked.disk().session()));
            let kept = asked.blocking_on_repository(move || trace.take(&session)).await?;
            Ok(to_value(kept)?)
        }
        Request::Save(request) => Ok(to_value(crate::save::answer(request, asked).await?)?),
        Request::Pivot { drive } => {
            let (service, disk, progress) = (Arc::clone(asked.service()), asked.number(), asked.teller());
            let tell = move |waiting: &str| progress(&PivotProgress { waiting: waiting.to_owned() });
            let home = asked.blocking(move || hand_over(&service, disk, &drive, &tell)).await?;
            Ok(to_value(home)?)
        }
        Request::TakeOver { .. } => Err(anyhow::anyhow!("it is answered where its sockets can be sent")),
    }
}

fn trace_of(asked: &Asked) -> anyhow::Result<Arc<TraceKeeper>> {
    asked.disk().trace.clone().ok_or_else(|| {
        Failure::new(
            "this agent records no boot trace",
            "start it with its repository, and without --no-trace",
        )
        .into()
    })
}

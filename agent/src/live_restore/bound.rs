//! What a start has before anything is made: the addresses, its own or those of an agent whose place it takes, and the claims that
//! keep others from the targets.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::OpenDevice;
use nbd_server::{Export, ExportNames, Server};

use super::late::LateExport;
use super::open::Found;
use super::order::{Order, Wanted};
use super::scrape::Scraped;
use super::take_over;
use super::target_lock;
use crate::cli::{Context, Interrupt};
use crate::in_use::Claim;

/// How long after it has its addresses a start has locked its targets, in general.
const OTHERS_START: Duration = Duration::from_millis(500);

/// What was had before anything was made: who listens, where its disks are put in, and what keeps others away.
pub(super) struct Bound {
    pub(super) server: Server,
    pub(super) exports: Vec<Arc<LateExport>>,
    pub(super) metrics: Option<Scraped>,
    pub(super) claims: Vec<Claim>,
    pub(super) has_taken_over: bool,
}

impl Bound {
    /// Has the addresses, and waits while another start is having those of an agent that both want to succeed.
    ///
    /// # Errors
    /// Where an address cannot be had, or a target that was not claimed before.
    pub(super) fn wait_for(
        order: &Order,
        wanted: &[Wanted],
        found: &[Found<'_>],
        context: &Context,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let exports: Vec<_> = found.iter().map(|found| Arc::new(LateExport::of(&found.names().1))).collect();
        let begun = Instant::now();
        loop {
            match bind(order, wanted, (found, &exports), context, interrupt) {
                // Somebody else has the place, and is not done with taking it.
                Err(error)
                    if order.takes_over
                        && is_address_in_use(&error)
                        && begun.elapsed() < take_over::PATIENCE_WITH_OTHERS =>
                {
                    interrupt.check()?;
                    std::thread::sleep(take_over::LOOK_INTERVAL);
                }
                bound => return bound.map_err(|error| in_use_rather_than(error, wanted, interrupt)),
            }
        }
    }
}

/// Has the addresses: those of an agent whose place is taken, who has ended then, or its own.
fn bind(
    order: &Order,
    wanted: &[Wanted],
    (found, late): (&[Found<'_>], &[Arc<LateExport>]),
    context: &Context,
    interrupt: &Interrupt,
) -> anyhow::Result<Bound> {
    let place = if order.takes_over {
        take_over::place(wanted, &order.listen, &order.server, order.engine, interrupt)?
    } else {
        None
    };
    let exports = nbd_exports(found, late);
    let bind_metrics =
        || order.metrics.as_ref().map(|address| Scraped::bind(address, &order.server.access)).transpose();
    let Some((predecessor, listeners)) = place else {
        let claims = if order.takes_over { claim_all(order, wanted)? } else { Vec::new() };
        let server = Server::bind(&order.listen, exports, order.server.clone())?;
        let metrics = bind_metrics()?;
        return Ok(Bound { server, exports: late.to_vec(), metrics, claims, has_taken_over: false });
    };
    let server = Server::listening(listeners, exports, order.server.clone())?;
    for found in found {
        found.look_ahead().inspect_err(|_| {
            context.output().warn(format_args!(
                "the agent with the process id {} goes on: its place cannot be taken like this",
                predecessor.pid()
            ));
        })?;
    }
    tracing::info!(pid = predecessor.pid(), "taking the place of the agent that serves");
    predecessor.end()?;
    server.own_listeners()?;
    let claims = claim_all(order, wanted)?;
    // Guests wait: they are not to wait for a scraper's address.
    let metrics = bind_metrics().unwrap_or_else(|error| {
        context.output().warn(format_args!("no metrics: {error:#}"));
        None
    });
    Ok(Bound { server, exports: late.to_vec(), metrics, claims, has_taken_over: true })
}

/// That another lifeboot has one of the targets, where that is why an address is in use: the same command, given twice.
fn in_use_rather_than(error: anyhow::Error, wanted: &[Wanted], interrupt: &Interrupt) -> anyhow::Error {
    if !is_address_in_use(&error) {
        return error;
    }
    let begun = Instant::now();
    loop {
        let used = |wanted: &Wanted| target_lock::in_use_by_another(&wanted.target, wanted.state.path());
        if let Some(used) = wanted.iter().find_map(used) {
            return used;
        }
        if begun.elapsed() >= OTHERS_START || interrupt.is_raised() {
            return error;
        }
        std::thread::sleep(take_over::LOOK_INTERVAL);
    }
}

fn is_address_in_use(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<nbd_server::Error>()
        .is_some_and(|error| error.kind() == nbd_server::ErrorKind::AddressInUse)
}

/// Keeps others from all of these targets.
pub(super) fn claim_all(order: &Order, wanted: &[Wanted]) -> anyhow::Result<Vec<Claim>> {
    let claims = wanted.iter().map(|wanted| claim(wanted, order.drive.is_some()));
    claims.filter_map(Result::transpose).collect()
}

/// Keeps others from a target until the session ends. An agent that serves it already is named. A QEMU that is being moved
/// onto it may have locked it; whether one is was looked at where `is_settled`.
fn claim(wanted: &Wanted, is_settled: bool) -> anyhow::Result<Option<Claim>> {
    let error = match crate::in_use::claim(&wanted.target) {
        Ok(claim) => return Ok(Some(claim)),
        Err(error) => error,
    };
    let dir = wanted.state.path();
    if let Ok(Some(record)) = wanted.state.record() {
        if is_settled && record.handed_over {
            return Ok(None);
        }
        wanted.state.check_stands_alone(&record, &wanted.target)?;
        record.check_not_handed_over(&wanted.state)?;
    }
    Err(target_lock::in_use_by_another(&wanted.target, dir).unwrap_or(error))
}

/// Exports of sessions that are still to be opened: whoever connects waits.
fn nbd_exports(found: &[Found<'_>], exports: &[Arc<LateExport>]) -> Vec<Export> {
    let exports = found.iter().zip(exports).map(|(found, late)| {
        let (snapshot, name) = found.names();
        let mut export = Export::new(name.clone(), Arc::clone(late) as Arc<dyn OpenDevice>);
        export.names = Some(Arc::clone(late) as Arc<dyn ExportNames>);
        export.description = format!("live restore of {snapshot}/{name}");
        export.dirty_bitmap = Some(super::DIRTY_BITMAP.to_owned());
        export
    });
    exports.collect()
}

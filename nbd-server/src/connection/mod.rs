//! One connection, from the greeting to the last reply: first [`negotiate`], then [`transmit`].
//! The one takes the socket by value and the other gets it, so nothing can be transmitted before GO.

mod ahead;
mod batch;
mod control;
mod end;
mod intake;
mod negotiate;
mod outbox;
mod pages;
mod parts;
mod perform;
mod read;
mod request;
mod spin;
mod stall;
mod status;
mod steps;
mod transmit;
mod turn;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

pub(crate) use control::Control;
use proto::server::Ending;
use proto::wire::Cut;

use crate::shard::{ShardState, Ticket};
use crate::socket::Socket;
use end::End;
use negotiate::Failed;

/// Serves one connection to its end. Its device operations have ended when this returns.
pub(crate) async fn serve(socket: Socket, mut ticket: Ticket, shard: Rc<ShardState>, control: Rc<Control>) {
    let timeout = shard.options.limits.handshake_timeout;
    // A handshake has no device operation in flight, so it may be dropped at any point.
    let negotiating = negotiate::negotiate(socket, &shard.devices, shard.options.tls.as_ref());
    let negotiated = tokio::select! {
        negotiated = tokio::time::timeout(timeout, negotiating) => negotiated,
        () = control.stopping() => {
            tracing::debug!("the server is ending: a handshake is cut short");
            return;
        }
        () = ticket.slot.given_away() => {
            give_way(&shard);
            return;
        }
    };
    let negotiated = match negotiated {
        Ok(Ok(negotiated)) => negotiated,
        Ok(Err(ending)) => {
            if let Failed::Ended(Ending::TooManyOptions) = ending
                && let Some(left_out) = shard.logs.handshake.admit(Instant::now())
            {
                tracing::warn!(
                    left_out,
                    "a client sent more options than its handshake may have: the connection is closed"
                );
            }
            tracing::debug!(%ending, "a handshake came to nothing");
            return;
        }
        Err(_) => {
            if let Some(left_out) = shard.logs.slow.admit(Instant::now()) {
                tracing::warn!(
                    seconds = timeout.as_secs_f64(),
                    left_out,
                    "a handshake took too long (--handshake-timeout): the connection is closed"
                );
            }
            return;
        }
    };
    if !ticket.slot.opened() {
        give_way(&shard);
        return;
    }
    let export = negotiated.agreed.info.name.clone();
    let logs = Arc::clone(&shard.logs);
    let end =
        transmit::transmit(negotiated, ticket.slot.transmitting(), ticket.neighbours(), shard, control).await;
    let export = Cut(&export);
    // To a guest that is a disk that is gone, so whoever looks for the reason finds it at any level.
    let (limit, what) = match end {
        End::Stalled(_) => (&logs.stalled, "a stalled client's connection was closed"),
        End::File(_) => (&logs.request, "a connection was closed; who reads there again is told the error"),
        _ => {
            tracing::debug!(%export, %end, "a connection ended");
            return;
        }
    };
    if let Some(left_out) = limit.admit(Instant::now()) {
        tracing::warn!(%export, %end, left_out, "{what}");
    }
}

fn give_way(shard: &ShardState) {
    if let Some(left_out) = shard.logs.handshake.admit(Instant::now()) {
        tracing::warn!(
            left_out,
            "a handshake gave its place to a newcomer: there are too many at once (--max-half-open)"
        );
    }
}

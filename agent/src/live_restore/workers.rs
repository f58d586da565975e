//! What the shards of a service run beside its connections.

use std::sync::Arc;

use nbd_server::{ShardContext, ShardTask};

use crate::live::LiveDisk;

/// Fills in flight on each shard at most, of all disks together: how many there are is up to what keeps the source busy.
const FILLS_PER_SHARD: usize = 32;
/// Each disk has at least so many of them.
const LEAST_FILLS: usize = 8;

/// What each shard runs beside its connections: fills, and on one shard for each disk the commits.
pub(super) fn of(disks: &[Arc<LiveDisk>]) -> ShardTask {
    let disks = disks.to_vec();
    Arc::new(move |shard| {
        let disks = disks.clone();
        Box::pin(run(shard, disks))
    })
}

async fn run(shard: ShardContext, disks: Vec<Arc<LiveDisk>>) {
    let fills = (FILLS_PER_SHARD / disks.len().max(1)).max(LEAST_FILLS);
    let mut tasks = tokio::task::JoinSet::new();
    for disk in &disks {
        let device = match disk.device() {
            Ok(device) => device,
            Err(error) => {
                tracing::error!(%error, "a shard cannot open a target: it copies nothing home");
                continue;
            }
        };
        for _ in 0..fills {
            tasks.spawn_local(device.clone().fill_worker());
        }
        if shard.index() == 0 {
            tasks.spawn_local(device.clone().commit_worker());
        }
    }
    shard.stopping().await;
    for disk in &disks {
        disk.session().stop_workers();
    }
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a worker of a session failed");
        }
    }
}

//! Moves disks home on a thread of its own, one after another: QEMU's monitor talks to one at a time, and makes whoever asks
//! wait.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;

use super::handover::hand_over;
use super::service::Service;
use crate::pivot::Drive;

/// How long it waits before it tries again what failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// Moves the drives of one QEMU.
pub(crate) struct Carrier {
    /// Which disks are to be moved; `None` once it is to end.
    orders: Option<mpsc::Sender<usize>>,
    failures: mpsc::Receiver<(usize, anyhow::Error)>,
    thread: Option<JoinHandle<()>>,
}

impl Carrier {
    /// Starts a thread that moves drives of this QEMU.
    ///
    /// # Errors
    /// Where there is no room for a thread.
    pub(crate) fn start(service: &Arc<Service>, drive: Drive) -> anyhow::Result<Self> {
        let (orders, ordered) = mpsc::channel();
        let (failed, failures) = mpsc::channel();
        let service = Arc::clone(service);
        let thread = std::thread::Builder::new()
            .name("carrier".into())
            .spawn(move || carry_all(&service, &drive, &ordered, &failed))
            .context("cannot start the thread that moves the machine home")?;
        Ok(Self { orders: Some(orders), failures, thread: Some(thread) })
    }

    /// Has this disk moved as soon as those before it are.
    pub(crate) fn carry(&self, disk: usize) {
        if let Some(orders) = &self.orders {
            // It ends only where it panicked; then nothing is moved, and the machine stays on the export.
            let _ = orders.send(disk);
        }
    }

    /// A disk that could not be moved, and why. It is tried again; the same reason is told once.
    pub(crate) fn failure(&self) -> Option<(usize, anyhow::Error)> {
        self.failures.try_recv().ok()
    }
}

/// Moves what is ordered until it is moved, or the service or the orders end. QEMU may not have been started yet, or
/// somebody else may talk to its monitor: what fails is tried again. What succeeded is seen on the disk itself.
fn carry_all(
    service: &Arc<Service>,
    drive: &Drive,
    ordered: &mpsc::Receiver<usize>,
    failed: &mpsc::Sender<(usize, anyhow::Error)>,
) {
    let mut pending: Vec<(usize, String)> = Vec::new();
    loop {
        let order = if pending.is_empty() {
            ordered.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            ordered.recv_timeout(RETRY_INTERVAL)
        };
        match order {
            Ok(disk) => pending.push((disk, String::new())),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        pending.retain_mut(|(disk, told)| {
            let Err(error) = hand_over(service, *disk, drive, &|waits| tracing::warn!("{waits}")) else {
                return false;
            };
            let said = format!("{error:#}");
            if said != *told {
                *told = said;
                let _ = failed.send((*disk, error));
            }
            true
        });
        if service.check_ending().is_err() {
            return;
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

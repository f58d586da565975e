//! The exports as one shard holds them: a device is opened at the first INFO or GO for it, shared by
//! the shard's connections, and closed with the last of them.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Instant;

use block::{BlockDevice, Geometry};
use proto::server::{Directory, ExportId, Listing, Refusal};
use proto::wire::{BlockSizes, Cut, ExportInfo, MetaContext, TransmissionFlags};

use crate::Export;
use crate::log_limit::LogLimits;

/// The devices that are open on a shard.
pub(crate) struct OpenDevices {
    exports: Arc<[Export]>,
    open: RefCell<Vec<Option<Weak<dyn BlockDevice>>>>,
    max_request: u32,
    logs: Arc<LogLimits>,
}

impl OpenDevices {
    pub(crate) fn new(exports: Arc<[Export]>, max_request: u32, logs: Arc<LogLimits>) -> Self {
        let open = RefCell::new(exports.iter().map(|_| None).collect());
        Self { exports, open, max_request, logs }
    }

    fn device(&self, id: ExportId) -> block::Result<Rc<dyn BlockDevice>> {
        let known = self.open.borrow()[id.0].as_ref().and_then(Weak::upgrade);
        if let Some(device) = known {
            return Ok(device);
        }
        let device = self.exports[id.0].device.open()?;
        self.open.borrow_mut()[id.0] = Some(Rc::downgrade(&device));
        Ok(device)
    }
}

/// The exports as one handshake sees them. Keeps the device that was described last open until transmission.
pub(crate) struct ConnectionDirectory {
    devices: Rc<OpenDevices>,
    described: RefCell<Option<(ExportId, Rc<dyn BlockDevice>)>>,
}

impl ConnectionDirectory {
    pub(crate) fn new(devices: Rc<OpenDevices>) -> Self {
        Self { devices, described: RefCell::new(None) }
    }

    /// The device of an export that was just described.
    pub(crate) fn into_device(self, id: ExportId) -> Option<Rc<dyn BlockDevice>> {
        self.described.into_inner().filter(|(described, _)| *described == id).map(|(_, device)| device)
    }
}

impl Directory for ConnectionDirectory {
    fn list(&self) -> Vec<Listing> {
        let listings = |export: &Export| {
            let description = export.description.clone();
            let names = std::iter::once(export.name.clone()).chain(export.further_names());
            names.map(move |name| Listing { name, description: description.clone() }).collect::<Vec<_>>()
        };
        self.devices.exports.iter().flat_map(listings).collect()
    }

    fn find(&self, name: &str) -> Option<ExportId> {
        if name.is_empty() {
            return Some(ExportId(0));
        }
        self.devices.exports.iter().position(|export| export.is_named(name)).map(ExportId)
    }

    fn why_absent(&self, name: &str) -> Option<String> {
        let names = self.devices.exports.iter().filter_map(|export| export.names.as_deref());
        let why = names.filter_map(|names| names.why_refused(name)).next();
        if let Some(left_out) = self.devices.logs.export.admit(Instant::now()) {
            match &why {
                Some(why) => tracing::warn!(export = %Cut(name), left_out, why, "a client was refused"),
                None => {
                    tracing::warn!(export = %Cut(name), left_out, "a client asked for an export that is not here")
                }
            }
        }
        why
    }

    fn contexts(&self, id: ExportId) -> Vec<MetaContext> {
        self.devices.exports[id.0].contexts()
    }

    fn describe(&self, id: ExportId) -> Result<ExportInfo, Refusal> {
        let export = &self.devices.exports[id.0];
        let device = self.devices.device(id).map_err(|error| {
            if let Some(left_out) = self.devices.logs.opening.admit(Instant::now()) {
                tracing::warn!(export = %Cut(&export.name), %error, left_out, "the export cannot be opened");
            }
            match error.kind() {
                block::ErrorKind::Shutdown => Refusal::ShuttingDown,
                _ => Refusal::Unavailable,
            }
        })?;
        let geometry = device.geometry();
        *self.described.borrow_mut() = Some((id, device));
        Ok(ExportInfo {
            name: export.name.clone(),
            description: export.description.clone(),
            size: geometry.size,
            flags: flags(&geometry, export.read_only),
            block_sizes: self.block_sizes(&geometry),
        })
    }
}

impl ConnectionDirectory {
    /// Any offset and length is served, so the smallest request is one byte.
    fn block_sizes(&self, geometry: &Geometry) -> BlockSizes {
        let maximum = self.devices.max_request;
        let preferred = geometry.preferred_io.max(geometry.minimum_io).max(BlockSizes::DEFAULT.preferred);
        let preferred = preferred.min(1 << maximum.max(1).ilog2());
        BlockSizes { minimum: 1, preferred, maximum }
    }
}

fn flags(geometry: &Geometry, read_only: bool) -> TransmissionFlags {
    use TransmissionFlags as Can;
    let read_only = read_only || geometry.read_only;
    Can::HAS_FLAGS
        .with(Can::SEND_FLUSH)
        .with(Can::SEND_FUA)
        .with(Can::SEND_CACHE)
        .with_if(read_only, Can::READ_ONLY)
        .with_if(!read_only && geometry.can_trim, Can::SEND_TRIM)
        .with_if(!read_only, Can::SEND_WRITE_ZEROES.with(Can::SEND_FAST_ZERO))
        .with_if(geometry.shared_flush, Can::CAN_MULTI_CONN)
}

//! A server of a small disk in memory, made of the pure half alone, for tests of both halves.
#![allow(dead_code, reason = "each test uses a part of it")]

use bytes::{Buf, BytesMut};
use proto::server::{
    Admission, Agreed, Command, Directory, ExportId, Handshake, Listing, Refusal, ReplyEncoder,
    StatusBuilder, Step, Verdict,
};
use proto::wire::{
    BlockSizes, Errno, ExportInfo, MAX_PAYLOAD_BYTES, MetaContext, NotARequest, RequestHeader,
    SelectedContext, TransmissionFlags,
};

pub(crate) const DISK_BYTES: usize = 64 * 1024;

pub(crate) struct Exports(pub(crate) Vec<(&'static str, &'static str)>);

impl Exports {
    pub(crate) fn two() -> Self {
        Self(vec![("disk0", "the first"), ("disk1", "")])
    }
}

impl Directory for Exports {
    fn list(&self) -> Vec<Listing> {
        let listing = |(name, description): &(&str, &str)| Listing {
            name: (*name).to_owned(),
            description: (*description).to_owned(),
        };
        self.0.iter().map(listing).collect()
    }

    fn find(&self, name: &str) -> Option<ExportId> {
        let wanted = if name.is_empty() { self.0.first()?.0 } else { name };
        self.0.iter().position(|(name, _)| *name == wanted).map(ExportId)
    }

    fn why_absent(&self, name: &str) -> Option<String> {
        (name == "former").then(|| "it is no more".to_owned())
    }

    fn contexts(&self, export: ExportId) -> Vec<MetaContext> {
        let mut contexts = vec![MetaContext::Allocation, MetaContext::Depth];
        if export == ExportId(0) {
            contexts.push(MetaContext::DirtyBitmap("restore".to_owned()));
        }
        contexts
    }

    fn describe(&self, export: ExportId) -> Result<ExportInfo, Refusal> {
        let (name, description) = self.0[export.0];
        let flags = TransmissionFlags::HAS_FLAGS
            .with(TransmissionFlags::SEND_FLUSH)
            .with(TransmissionFlags::SEND_FUA)
            .with(TransmissionFlags::SEND_TRIM)
            .with(TransmissionFlags::SEND_WRITE_ZEROES)
            .with(TransmissionFlags::SEND_CACHE);
        Ok(ExportInfo {
            name: name.to_owned(),
            description: description.to_owned(),
            size: DISK_BYTES as u64,
            flags,
            block_sizes: BlockSizes::DEFAULT,
        })
    }
}

/// The pure server: handshake, then requests on a disk in memory. Its readers of 4096-byte blocks
/// of zeroes are told of holes.
pub(crate) struct Server {
    handshake: Option<Handshake>,
    pub(crate) agreed: Option<Agreed>,
    pub(crate) closed: bool,
    pub(crate) disk: Vec<u8>,
    input: BytesMut,
    output: BytesMut,
}

impl Server {
    pub(crate) fn new() -> Self {
        Self {
            handshake: Some(Handshake::new()),
            agreed: None,
            closed: false,
            disk: vec![0; DISK_BYTES],
            input: BytesMut::new(),
            output: BytesMut::new(),
        }
    }

    pub(crate) fn take_output(&mut self) -> BytesMut {
        if let Some(handshake) = &mut self.handshake {
            self.output.extend_from_slice(&handshake.take_output());
        }
        self.output.split()
    }

    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        if self.closed {
            return;
        }
        if let Some(handshake) = &mut self.handshake {
            handshake.receive(bytes);
            loop {
                let step = handshake.step(&Exports::two());
                self.output.extend_from_slice(&handshake.take_output());
                match step {
                    Step::Waiting => return,
                    Step::Answered => {}
                    Step::StartTls | Step::Closed(_) => {
                        self.closed = true;
                        return;
                    }
                    Step::Transmission(agreed) => {
                        self.agreed = Some(*agreed);
                        break;
                    }
                }
            }
            let handshake = self.handshake.take().expect("it is there");
            self.input.extend_from_slice(&handshake.into_rest());
        } else {
            self.input.extend_from_slice(bytes);
        }
        while !self.closed && self.transmit() {}
    }

    fn transmit(&mut self) -> bool {
        let agreed = self.agreed.clone().expect("transmission follows agreement");
        let style = agreed.replies;
        let header = match RequestHeader::at_front(&self.input, style) {
            Ok(Some(header)) => header,
            Ok(None) => return false,
            Err(NotARequest) => {
                self.closed = true;
                return false;
            }
        };
        let admission = Admission {
            size: agreed.info.size,
            flags: agreed.info.flags,
            replies: style,
            has_contexts: !agreed.contexts.is_empty(),
            max_request: MAX_PAYLOAD_BYTES,
        };
        let verdict = admission.check(&header);
        if verdict == Verdict::TooLong {
            self.closed = true;
            return false;
        }
        let payload_len = header.payload_len(style) as usize;
        if self.input.len() < style.request_bytes() + payload_len {
            return false;
        }
        self.input.advance(style.request_bytes());
        let payload = self.input.split_to(payload_len);
        let encoder = ReplyEncoder::new(style);
        match verdict {
            Verdict::Perform(command) => {
                self.perform(&header, command, &payload, encoder, &agreed.contexts);
            }
            Verdict::Filter { one } => match admission.filter(&header, &payload, &agreed.contexts) {
                Ok((header, contexts)) => {
                    self.perform(&header, Command::BlockStatus { one }, &[], encoder, &contexts);
                }
                Err(errno) => self.output.extend_from_slice(&encoder.refused(&header, errno)),
            },
            Verdict::Nothing => self.output.extend_from_slice(&encoder.done(&header)),
            Verdict::Refuse(errno) => {
                let offset = (errno == Errno::NoSpace).then_some(header.offset);
                self.output.extend_from_slice(&encoder.failed(&header, errno, offset, "so it is"));
            }
            Verdict::Disconnect | Verdict::TooLong => self.closed = true,
        }
        true
    }

    fn perform(
        &mut self,
        header: &RequestHeader,
        command: Command,
        payload: &[u8],
        encoder: ReplyEncoder,
        contexts: &[SelectedContext],
    ) {
        let start = header.offset as usize;
        let range = start..start + header.len as usize;
        match command {
            Command::Read { whole } => {
                if whole || !encoder.style().has_chunks() {
                    self.output.extend_from_slice(&encoder.data(header));
                    self.output.extend_from_slice(&self.disk[range]);
                    return;
                }
                let mut at = range.start;
                while at < range.end {
                    let end = ((at / 4096 + 1) * 4096).min(range.end);
                    let last = end == range.end;
                    let len = (end - at) as u64;
                    if self.disk[at..end].iter().all(|byte| *byte == 0) {
                        let hole = encoder.hole_chunk(header, at as u64, len, last);
                        self.output.extend_from_slice(&hole);
                    } else {
                        let head = encoder.data_chunk(header, at as u64, len, last);
                        self.output.extend_from_slice(&head);
                        self.output.extend_from_slice(&self.disk[at..end]);
                    }
                    at = end;
                }
                return;
            }
            Command::Write { .. } => self.disk[range].copy_from_slice(payload),
            Command::WriteZeroes { .. } => self.disk[range].fill(0),
            Command::BlockStatus { one } => {
                for (number, selected) in contexts.iter().enumerate() {
                    let max = if one { 1 } else { 64 };
                    let mut builder = StatusBuilder::new(header.len, max, encoder.style());
                    builder.push(4096, 3);
                    builder.push(u64::MAX, 0);
                    let last = number + 1 == contexts.len();
                    let descriptors = builder.finish();
                    encoder.status_chunk(&mut self.output, header, selected.id, &descriptors, last);
                }
                return;
            }
            Command::Flush | Command::Trim { .. } | Command::Cache => {}
        }
        self.output.extend_from_slice(&encoder.done(header));
    }
}

//! Random requests, one after the other, compared with a model of what the disk may hold.

use block::{AlignedBuf, Attempt, BlockDevice, ByteRange, Durability, ErrorKind, ZeroMode};
use proptest::prelude::*;

use crate::disks;

const SIZE: u64 = 96 << 10;

#[derive(Clone, Debug)]
enum Request {
    Read(ByteRange),
    TryRead(ByteRange),
    Write(ByteRange, u8, Durability),
    TryWrite(ByteRange, u8),
    Zero(ByteRange, ZeroMode, Durability),
    Trim(ByteRange, Durability),
    Flush,
    Extents(ByteRange),
    Outside(u64, u64),
}

fn ranges() -> impl Strategy<Value = ByteRange> {
    let anywhere = (0..=SIZE, 0..=SIZE).prop_map(|(a, b)| ByteRange::from_bounds(a.min(b), a.max(b)));
    let small = (0..SIZE, 0u64..700).prop_map(|(at, len)| ByteRange::from_bounds(at, (at + len).min(SIZE)));
    let whole = (0u64..24, 1u64..8)
        .prop_map(|(at, len)| ByteRange::from_bounds(at * 4096, ((at + len) * 4096).min(SIZE)));
    let sectors = (0u64..191, 1u64..16)
        .prop_map(|(at, len)| ByteRange::from_bounds(at * 512, ((at + len) * 512).min(SIZE)));
    prop_oneof![1 => anywhere, 2 => small, 3 => whole, 2 => sectors]
}

fn requests() -> impl Strategy<Value = Request> {
    let durability = prop_oneof![4 => Just(Durability::Volatile), 1 => Just(Durability::Stable)];
    let mode = (any::<bool>(), any::<bool>())
        .prop_map(|(may_unmap, only_if_fast)| ZeroMode { may_unmap, only_if_fast });
    prop_oneof![
        3 => ranges().prop_map(Request::Read),
        1 => ranges().prop_map(Request::TryRead),
        5 => (ranges(), 1u8.., durability.clone()).prop_map(|(r, byte, d)| Request::Write(r, byte, d)),
        2 => (ranges(), 1u8..).prop_map(|(r, byte)| Request::TryWrite(r, byte)),
        2 => (ranges(), mode, durability.clone()).prop_map(|(r, m, d)| Request::Zero(r, m, d)),
        2 => (ranges(), durability).prop_map(|(r, d)| Request::Trim(r, d)),
        1 => Just(Request::Flush),
        1 => ranges().prop_map(Request::Extents),
        1 => (0..=u64::MAX, 1..SIZE).prop_map(|(at, len)| Request::Outside(at, len)),
    ]
}

/// What each byte may read as.
struct Model(Vec<Byte>);

#[derive(Clone, Copy)]
struct Byte {
    value: u8,
    /// It was trimmed: it may read as zero instead.
    or_zero: bool,
}

impl Model {
    fn fill(&mut self, range: ByteRange, pattern: impl Fn(usize) -> u8) {
        for (at, byte) in self.slice(range).iter_mut().enumerate() {
            *byte = Byte { value: pattern(at), or_zero: false };
        }
    }

    fn trim(&mut self, range: ByteRange) {
        self.slice(range).iter_mut().for_each(|byte| byte.or_zero = true);
    }

    fn slice(&mut self, range: ByteRange) -> &mut [Byte] {
        &mut self.0[range.start() as usize..range.end() as usize]
    }

    fn check(&self, range: ByteRange, bytes: &[u8], who: &str) {
        assert_eq!(bytes.len() as u64, range.len());
        for (at, (&read, byte)) in (range.start()..).zip(bytes.iter().zip(&self.0[range.start() as usize..]))
        {
            let allowed = read == byte.value || (byte.or_zero && read == 0);
            assert!(allowed, "{who}: byte {at} reads as {read}, not {} ({range})", byte.value);
        }
    }
}

/// Bytes that differ from place to place, so that a shifted copy is seen.
fn pattern(byte: u8) -> impl Fn(usize) -> u8 {
    move |at| byte.wrapping_add(at as u8).max(1)
}

fn buffer(range: ByteRange, byte: u8) -> AlignedBuf {
    let pattern = pattern(byte);
    AlignedBuf::from_slice(&(0..range.len() as usize).map(pattern).collect::<Vec<_>>())
}

async fn play(device: &dyn BlockDevice, model: &mut Model, request: &Request, who: &str) {
    match *request {
        Request::Read(range) => {
            let (result, buf) =
                device.read(range.start(), AlignedBuf::from_slice(&vec![0xa5; range.len() as usize])).await;
            result.unwrap();
            model.check(range, &buf, who);
        }
        Request::TryRead(range) => {
            let mut bytes = vec![0xa5; range.len() as usize];
            if device.try_read(range.start(), &mut bytes).unwrap() == Attempt::Done {
                model.check(range, &bytes, who);
            }
        }
        Request::Write(range, byte, durability) => {
            let (result, buf) = device.write(range.start(), buffer(range, byte), durability).await;
            result.unwrap();
            assert_eq!(buf[..], buffer(range, byte)[..], "the buffer comes back as it was");
            model.fill(range, pattern(byte));
        }
        Request::TryWrite(range, byte) => {
            let data = buffer(range, byte);
            if device.try_write(range.start(), &data).unwrap() == Attempt::WouldWait {
                device.write(range.start(), data, Durability::Volatile).await.0.unwrap();
            }
            model.fill(range, pattern(byte));
        }
        Request::Zero(range, mode, durability) => match device.write_zeroes(range, mode, durability).await {
            Ok(()) => model.fill(range, |_| 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{who}: {error}");
                assert!(mode.only_if_fast, "{who}: {error}");
            }
        },
        Request::Trim(range, durability) => {
            device.trim(range, durability).await.unwrap();
            model.trim(range);
        }
        Request::Flush => device.flush().await.unwrap(),
        Request::Extents(range) => {
            let extents = device.extents(range, 1000).await.unwrap();
            let mut at = range.start();
            for extent in extents {
                assert_eq!(extent.range.start(), at, "{who}: extents have no gaps");
                assert!(!extent.range.is_empty(), "{who}: an empty extent says nothing");
                at = extent.range.end();
                if extent.state.zero {
                    let zero = |byte: &Byte| byte.value == 0 || byte.or_zero;
                    assert!(
                        model.slice(extent.range).iter().all(zero),
                        "{who}: {} is not zero",
                        extent.range
                    );
                }
            }
            assert_eq!(at, range.end(), "{who}: extents reach the end");
        }
        Request::Outside(at, len) => {
            let at = at.max(SIZE + 1 - len.min(SIZE));
            let kind = |result: block::Result<()>| result.unwrap_err().kind();
            let buf = AlignedBuf::zeroed(len as usize);
            assert_eq!(
                kind(device.try_read(at, &mut vec![0; len as usize]).map(drop)),
                ErrorKind::InvalidRange
            );
            assert_eq!(kind(device.try_write(at, &buf).map(drop)), ErrorKind::InvalidRange);
            let (result, buf) = device.read(at, buf).await;
            assert_eq!(kind(result), ErrorKind::InvalidRange, "{who}: a read of {len} at {at}");
            let (result, _) = device.write(at, buf, Durability::Volatile).await;
            assert_eq!(kind(result), ErrorKind::InvalidRange, "{who}: a write of {len} at {at}");
            if let Some(range) = ByteRange::new(at, len) {
                let result = device.write_zeroes(range, ZeroMode::UNMAP, Durability::Volatile).await;
                assert_eq!(kind(result), ErrorKind::InvalidRange);
                assert_eq!(kind(device.trim(range, Durability::Volatile).await), ErrorKind::InvalidRange);
                assert_eq!(kind(device.extents(range, 1).await.map(drop)), ErrorKind::InvalidRange);
            }
        }
    }
}

#[test]
fn every_disk_behaves_like_the_model() {
    let subjects = disks::subjects(SIZE);
    let config = ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() };
    let all = ByteRange::from_bounds(0, SIZE);
    proptest!(config, |(script in proptest::collection::vec(requests(), 1..40))| {
        for subject in &subjects {
            subject.engine.run(async {
                let device = subject.device.open().unwrap();
                device.write_zeroes(all, ZeroMode::UNMAP, Durability::Volatile).await.unwrap();
                let mut model = Model(vec![Byte { value: 0, or_zero: false }; SIZE as usize]);
                for request in &script {
                    play(&*device, &mut model, request, &subject.name).await;
                }
                // Another handle sees the same, and so does whoever opens it anew.
                let (result, buf) = subject.device.open().unwrap().read(0, AlignedBuf::zeroed(SIZE as usize)).await;
                result.unwrap();
                model.check(all, &buf, &subject.name);
            });
        }
    });
}

#[test]
fn requests_of_no_bytes_are_done_anywhere_inside() {
    for subject in disks::subjects(SIZE) {
        subject.engine.run(async {
            let device = subject.device.open().unwrap();
            for at in [0, 1, 4096, SIZE] {
                let none = ByteRange::new(at, 0).unwrap();
                device.read(at, AlignedBuf::zeroed(0)).await.0.unwrap();
                device.write(at, AlignedBuf::zeroed(0), Durability::Stable).await.0.unwrap();
                device.write_zeroes(none, ZeroMode::UNMAP, Durability::Stable).await.unwrap();
                device.trim(none, Durability::Stable).await.unwrap();
                assert_eq!(device.extents(none, 1).await.unwrap(), [], "{}", subject.name);
            }
        });
    }
}

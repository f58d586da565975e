//! The move against a QEMU that is made up.

mod fake_qemu;

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::PathBuf;

use nbd_server::ListenAddress;

use fake_qemu::{FakeQemu, Mishap, SIZE};

use super::qmp::QmpError;
use super::{Drive, Home, Moved, Notes, Trouble, Whereabouts, at_home, carry_home, whereabouts};

/// What is kept of a move.
#[derive(Default)]
struct Noted {
    is_begun: bool,
    is_marked: bool,
    cannot_mark: bool,
}

impl Notes for Noted {
    fn begin(&mut self) -> anyhow::Result<()> {
        self.is_begun = true;
        Ok(())
    }

    fn mark(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.cannot_mark, "the disk is full");
        self.is_marked = true;
        Ok(())
    }

    fn forget(&mut self) {
        self.is_begun = false;
    }
}

/// A target, and an export that leads to it.
struct Place {
    dir: tempfile::TempDir,
    target: PathBuf,
    file: Metadata,
    addresses: [ListenAddress; 1],
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("t.raw");
        File::create(&target).unwrap().set_len(SIZE).unwrap();
        let file = std::fs::metadata(&target).unwrap();
        let addresses = [ListenAddress::Unix(dir.path().join("s"))];
        Self { dir, target, file, addresses }
    }

    fn home(&self) -> Home<'_> {
        Home {
            target: &self.target,
            file: self.file.clone(),
            held: None,
            size: SIZE,
            addresses: &self.addresses,
            export: "disk0",
            epoch: 1,
            is_default: true,
            session: "0123456789abcdef",
        }
    }

    fn qemu(&self, raw: Option<&str>, nbd: &str) -> FakeQemu {
        let ListenAddress::Unix(socket) = &self.addresses[0] else { unreachable!() };
        FakeQemu::new(socket, raw, nbd)
    }

    /// Moves it; returns whether the mark was made too.
    fn carry(&self, qemu: &mut FakeQemu, device: Option<&str>) -> (Result<Moved, Trouble>, bool) {
        let mut noted = Noted::default();
        (self.carry_noting(qemu, device, &mut noted), noted.is_marked)
    }

    fn carry_noting(
        &self,
        qemu: &mut FakeQemu,
        device: Option<&str>,
        noted: &mut Noted,
    ) -> Result<Moved, Trouble> {
        let drive = Drive { qmp: "/qmp".into(), device: device.map(str::to_owned), aio: None };
        let moved = carry_home(qemu, &self.home(), &drive, noted);
        let has_open = qemu.nodes.contains_key("lifeboot-home-0123456789ab");
        assert!(noted.is_begun || !has_open, "QEMU has the target open, and nothing says so");
        assert!(noted.is_begun || !noted.is_marked);
        moved
    }

    #[track_caller]
    fn refused(&self, qemu: &mut FakeQemu, device: Option<&str>) -> String {
        let mut noted = Noted::default();
        let moved = self.carry_noting(qemu, device, &mut noted);
        assert!(!noted.is_marked, "the session was marked");
        assert!(!noted.is_begun, "a move that came to nothing was not forgotten");
        assert_eq!(qemu.bottom(), "nbd");
        assert!(qemu.nodes.keys().all(|name| !name.starts_with("lifeboot-")), "{:?}", qemu.nodes);
        match moved.unwrap_err() {
            Trouble::OnExport(error) => format!("{error:#}"),
            error => panic!("{error:?}"),
        }
    }
}

/// The graphs that QEMU's own arguments make: `-blockdev`, `-drive` with and without a name, a device on the NBD node.
const GRAPHS: [(Option<&str>, &str); 5] = [
    (Some("raw0"), "nbd0"),
    (Some("raw0"), "#block007"),
    (Some("#block123"), "#block007"),
    (None, "#block007"),
    (None, "nbd0"),
];

#[test]
fn a_drive_of_every_graph_comes_home_and_nothing_of_the_export_stays() {
    for (raw, nbd) in GRAPHS {
        let place = Place::new();
        let mut qemu = place.qemu(raw, nbd);
        let (moved, is_marked) = place.carry(&mut qemu, None);
        let moved = moved.unwrap();
        assert!(is_marked);
        assert_eq!(qemu.bottom(), "file", "{raw:?} {nbd}");
        assert!(qemu.nodes.values().all(|node| node.driver != "nbd"), "{:?}", qemu.nodes);
        assert!(qemu.nodes.contains_key(&moved.node) && qemu.nodes.contains_key(&moved.file_node));
        assert_eq!(whereabouts(&mut qemu, &place.home(), None).unwrap(), Whereabouts::Target);
        // Once more is no mistake.
        let (again, is_marked) = place.carry(&mut qemu, None);
        again.unwrap();
        assert!(is_marked);
    }
}

#[test]
fn whatever_goes_wrong_at_any_command_the_drive_is_where_it_is_said_to_be_and_comes_home_at_last() {
    for (raw, nbd) in GRAPHS {
        for mishap in [Mishap::Refused, Mishap::Lost, Mishap::DoneSilently] {
            let mut at = 0;
            loop {
                let place = Place::new();
                let mut qemu = place.qemu(raw, nbd);
                qemu.mishap = Some((at, mishap));
                let (moved, is_marked) = place.carry(&mut qemu, None);
                let has_happened = qemu.commands.len() > at;
                let context = format!("{raw:?} {nbd} {mishap:?} at {at}: {:?}", qemu.commands.last());
                match moved {
                    Ok(_) => assert_eq!(qemu.bottom(), "file", "{context}"),
                    Err(Trouble::OnExport(_)) => assert_eq!(qemu.bottom(), "nbd", "{context}"),
                    Err(Trouble::Unknown(_)) => assert!(is_marked, "{context}"),
                    Err(Trouble::Elsewhere(error)) => panic!("{context}: {error:#}"),
                }
                if qemu.bottom() == "file" || qemu.job {
                    assert!(is_marked, "QEMU writes to the target, and the session is not marked: {context}");
                }
                // Another connection, and nothing in its way.
                (qemu.is_silent, qemu.mishap) = (false, None);
                let told = whereabouts(&mut qemu, &place.home(), None).unwrap();
                let expected = match (qemu.bottom(), qemu.job) {
                    ("nbd", false) => Whereabouts::Export,
                    ("nbd", true) => Whereabouts::Both,
                    _ => Whereabouts::Target,
                };
                assert_eq!(told, expected, "{context}");
                let (moved, _) = place.carry(&mut qemu, None);
                moved.unwrap_or_else(|error| panic!("{context}: {error:?}"));
                assert_eq!(qemu.bottom(), "file", "{context}");
                assert!(qemu.nodes.values().all(|node| node.driver != "nbd"), "{context}: {:?}", qemu.nodes);
                assert!(!qemu.job, "{context}");
                if !has_happened {
                    break;
                }
                at += 1;
            }
            assert!(at > 8, "it ran {at} commands alone");
        }
    }
}

#[test]
fn what_an_agent_that_ended_left_behind_goes_while_nobody_serves_the_export() {
    for (raw, nbd) in GRAPHS {
        // Whatever it was killed at, and with it the export.
        for at in 0.. {
            let place = Place::new();
            let mut qemu = place.qemu(raw, nbd);
            qemu.mishap = Some((at, Mishap::DoneSilently));
            let (moved, _) = place.carry(&mut qemu, None);
            (qemu.is_silent, qemu.mishap, qemu.is_export_gone) = (false, None, true);
            if whereabouts(&mut qemu, &place.home(), None).unwrap() == Whereabouts::Target {
                let context = format!("{raw:?} {nbd} at {at}");
                at_home(&mut qemu, &place.home()).unwrap_or_else(|error| panic!("{context}: {error:?}"));
                assert!(qemu.nodes.values().all(|node| node.driver != "nbd"), "{context}: {:?}", qemu.nodes);
            }
            if moved.is_ok() {
                break;
            }
        }
    }
}

#[test]
fn a_qemu_that_waits_for_its_export_is_said_to_be_silent() {
    let place = Place::new();
    let mut qemu = place.qemu(Some("raw0"), "nbd0");
    place.carry(&mut qemu, None).0.unwrap();
    // One without `yank`, and with a node that nothing uses.
    let ListenAddress::Unix(socket) = &place.addresses[0] else { unreachable!() };
    let left = FakeQemu::new(socket, None, "nbd0").nodes.remove("nbd0").unwrap();
    qemu.nodes.insert("nbd0".into(), left);
    qemu.yanked.clear();
    (qemu.is_export_gone, qemu.mishap) = (true, Some((qemu.commands.len() + 3, Mishap::Refused)));
    let error = at_home(&mut qemu, &place.home()).unwrap_err();
    assert_eq!(qemu.commands.last().unwrap(), "blockdev-del");
    assert!(matches!(error, Trouble::Unknown(QmpError::Silent(_))), "{error:?}");
}

#[test]
fn a_mark_that_cannot_be_made_leaves_the_drive_on_the_export() {
    let place = Place::new();
    let mut qemu = place.qemu(Some("raw0"), "nbd0");
    let mut noted = Noted { cannot_mark: true, ..Noted::default() };
    let moved = place.carry_noting(&mut qemu, None, &mut noted);
    assert!(matches!(moved, Err(Trouble::OnExport(_))) && !noted.is_begun);
    assert_eq!(qemu.bottom(), "nbd");
    assert_eq!(qemu.nodes.len(), 2, "{:?}", qemu.nodes);
}

#[test]
fn a_drive_is_named_by_its_device_its_path_or_its_node() {
    for device in ["drive0", "disk-a", "/machine/peripheral/disk-a/virtio-backend", "raw0", "nbd0"] {
        let place = Place::new();
        let mut qemu = place.qemu(Some("raw0"), "nbd0");
        let (moved, _) = place.carry(&mut qemu, Some(device));
        moved.unwrap_or_else(|error| panic!("{device}: {error:?}"));
        // By each of its names it is found there, one that went with the move included.
        let told = whereabouts(&mut qemu, &place.home(), Some(device)).unwrap();
        assert_eq!(told, Whereabouts::Target, "{device}");
    }
    let place = Place::new();
    let said = place.refused(&mut place.qemu(Some("raw0"), "nbd0"), Some("disk"));
    assert!(said.contains("\"drive0\"") && said.contains("\"raw0\""), "it says what there is: {said}");
}

#[test]
fn what_is_not_the_whole_export_or_not_the_same_file_is_left_alone() {
    let place = Place::new();
    let mut other = place.qemu(Some("raw0"), "nbd0");
    other.nodes.get_mut("nbd0").unwrap().file = "nbd+unix:///disk1?socket=/elsewhere".into();
    let said = place.refused(&mut other, None);
    assert!(said.contains("/elsewhere"), "it says what there is: {said}");

    let mut part = place.qemu(Some("raw0"), "nbd0");
    part.nodes.get_mut("raw0").unwrap().size = SIZE / 2;
    place.refused(&mut part, None);

    let mut small = place.qemu(Some("raw0"), "nbd0");
    small.target_size = Some(SIZE / 2);
    place.refused(&mut small, None);

    // A process that has not opened the target: QEMU's path means another file.
    let mut foreign = place.qemu(Some("raw0"), "nbd0");
    foreign.process = 1;
    let said = place.refused(&mut foreign, None);
    assert!(said.contains("another file") || said.contains("cannot tell"), "{said}");

    let mut layered = place.qemu(Some("raw0"), "nbd0");
    layered.nodes.get_mut("raw0").unwrap().driver = "luks";
    let said = place.refused(&mut layered, None);
    assert!(said.contains("luks"), "{said}");

    let mut gone = place.qemu(Some("raw0"), "nbd0");
    std::fs::remove_file(&place.target).unwrap();
    let said = place.refused(&mut gone, None);
    assert!(said.contains("nothing stands there now"), "{said}");
}

/// Gives the target's path to a copy of it; returns what the target is called then.
fn swap(place: &Place) -> PathBuf {
    let (renamed, copy) = (place.dir.path().join("renamed"), place.dir.path().join("copy"));
    std::fs::copy(&place.target, &copy).unwrap();
    std::fs::rename(&place.target, &renamed).unwrap();
    std::fs::rename(&copy, &place.target).unwrap();
    renamed
}

/// What is said and advised where the target's path does not lead to it.
fn does_not_stand(home: &Home<'_>) -> String {
    let (what, advice) = crate::cli::told(&super::opened::check_stands_at_its_path(home).unwrap_err());
    format!("{what}\n{}", advice.unwrap())
}

#[test]
fn a_file_that_took_the_targets_path_is_not_opened() {
    let place = Place::new();
    let renamed = swap(&place);
    let mut qemu = place.qemu(Some("raw0"), "nbd0");
    let said = place.refused(&mut qemu, None);
    assert!(said.contains("another file stands there now"), "{said}");
    assert!(!qemu.commands.iter().any(|command| command == "blockdev-add"), "{:?}", qemu.commands);

    // Whoever serves it knows what it is called.
    let held = File::open(&renamed).unwrap();
    let by = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held)).into();
    let home = Home { held: Some(by), ..place.home() };
    let said = || does_not_stand(&home);
    let clear = format!("move what stands at {} away first", place.target.display());
    assert!(said().contains("renamed") && said().contains(&clear), "{}", said());
    std::fs::remove_file(&place.target).unwrap();
    assert!(said().contains("renamed") && !said().contains(&clear), "{}", said());
    std::fs::create_dir(&place.target).unwrap();
    assert!(said().contains("a directory stands there") && said().contains(&clear), "{}", said());
    std::fs::remove_file(&renamed).unwrap();
    assert!(said().contains("was removed from"), "{}", said());
}

#[test]
fn of_a_device_only_the_node_is_made_again() {
    let is_device =
        |path: &PathBuf| std::fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device());
    let mut nodes = std::fs::read_dir("/dev").unwrap().flatten().map(|entry| entry.path());
    // A host may have none.
    let Some(node) = nodes.find(is_device) else { return };
    let place = Place::new();
    let file = std::fs::metadata(node).unwrap();
    let (major, minor) = (rustix::fs::major(file.rdev()), rustix::fs::minor(file.rdev()));
    let home = Home { held: Some("/proc/self/exe".into()), file, ..place.home() };
    let said = || does_not_stand(&home);
    let make = format!("make it again (`mknod {} b {major} {minor}`", place.target.display());
    assert!(said().contains("has the device open: move what stands") && said().contains(&make), "{}", said());
    std::fs::remove_file(&place.target).unwrap();
    assert!(said().contains("nothing stands there now") && said().contains(&make), "{}", said());
    assert!(!said().contains("was removed"), "{}", said());
}

#[test]
fn a_file_that_takes_the_targets_path_while_qemu_opens_it_is_closed_again() {
    let place = Place::new();
    let mut qemu = place.qemu(Some("raw0"), "nbd0");
    qemu.opens_instead = Some(place.dir.path().join("copy"));
    std::fs::copy(&place.target, place.dir.path().join("copy")).unwrap();
    let said = place.refused(&mut qemu, None);
    assert!(said.contains("is another file than the one that is restored here"), "{said}");
}

#[test]
fn a_machine_runs_from_the_target_only_while_qemu_has_that_very_file_open() {
    let place = Place::new();
    let mut qemu = place.qemu(Some("raw0"), "nbd0");
    place.carry(&mut qemu, None).0.unwrap();
    let renamed = swap(&place);
    at_home(&mut qemu, &place.home()).unwrap();
    for copy in [&place.target, &renamed] {
        let home = Home { file: std::fs::metadata(copy).unwrap(), ..place.home() };
        let is_it = copy == &renamed;
        assert_eq!(at_home(&mut qemu, &home).is_ok(), is_it, "{}", copy.display());
        let mut noted = Noted::default();
        let drive = Drive { qmp: "/qmp".into(), device: None, aio: None };
        let carried = carry_home(&mut qemu, &home, &drive, &mut noted);
        assert_eq!(matches!(carried, Err(Trouble::Elsewhere(_))), !is_it, "{carried:?}");
        assert_eq!(noted.is_marked, is_it);
    }
}

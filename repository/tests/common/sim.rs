//! A file system in memory that forgets at a power cut what was not synced: bytes of files, and names in directories, each by itself.
//!
//! It can also run out of space, and make the mistakes that the order of a commit exists to avoid.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use repository::storage::{ReadFile, Storage, WriteFile, WriteHint};

/// A mistake in the order of things, made below the repository so that its code need not have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mistake {
    #[default]
    None,
    /// Files are given their names without having been synced.
    NoSyncBeforeRename,
    /// Names are never synced.
    NoDirSync,
    /// The index is published before the packs that it names.
    IndexBeforePack,
    /// The manifest is published before anything that it names.
    ManifestFirst,
}

/// The file system. Clones share it; [`Sim::fork`] makes another.
#[derive(Clone, Default)]
pub struct Sim(Arc<Mutex<World>>);

#[derive(Clone, Default)]
struct World {
    files: HashMap<u64, File>,
    dirs: BTreeMap<String, Dir>,
    next_file: u64,
    /// How many operations have changed something.
    ops: u64,
    cut_at: Option<u64>,
    full_at: Option<u64>,
    dead: bool,
    mistake: Mistake,
    held: Vec<(String, String)>,
    release: bool,
}

/// A file is only appended to, so what is durable is its beginning.
#[derive(Clone, Default)]
struct File {
    bytes: Vec<u8>,
    durable: usize,
}

#[derive(Clone, Default)]
struct Dir {
    now: BTreeMap<String, Entry>,
    durable: BTreeMap<String, Entry>,
    pending: Vec<(String, Option<Entry>)>,
}

#[derive(Clone, Copy)]
enum Entry {
    File(u64),
    Dir,
}

impl Dir {
    fn set(&mut self, name: &str, entry: Option<Entry>) {
        match entry {
            Some(entry) => self.now.insert(name.into(), entry),
            None => self.now.remove(name),
        };
        self.pending.push((name.into(), entry));
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit.max(1) as u64) as usize
    }
}

impl Sim {
    pub fn new() -> Self {
        let sim = Self::default();
        sim.lock().dirs.insert(String::new(), Dir::default());
        sim
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    pub fn storage(&self) -> Arc<dyn Storage> {
        Arc::new(self.clone())
    }

    /// Another file system that is the same until something happens to one of them.
    pub fn fork(&self) -> Self {
        let mut world = self.lock().clone();
        (world.ops, world.cut_at, world.full_at) = (0, None, None);
        Self(Arc::new(Mutex::new(world)))
    }

    pub fn with_mistake(self, mistake: Mistake) -> Self {
        self.lock().mistake = mistake;
        self
    }

    /// The power goes at this operation; nothing works from then on.
    pub fn cut_at(self, op: u64) -> Self {
        self.lock().cut_at = Some(op);
        self
    }

    /// There is no space left from this operation on.
    pub fn full_at(self, op: u64) -> Self {
        self.lock().full_at = Some(op);
        self
    }

    pub fn ops(&self) -> u64 {
        self.lock().ops
    }

    pub fn was_cut(&self) -> bool {
        self.lock().dead
    }

    /// What there is after the power came back: what was synced, and by chance some of the rest.
    pub fn after_power_cut(&self, seed: u64) -> Self {
        let mut world = self.lock().clone();
        let mut random = Random(seed);
        for file in world.files.values_mut() {
            let unsynced = file.bytes.len() - file.durable;
            match random.below(4) {
                0 => file.bytes.truncate(file.durable),
                1 => file.bytes.truncate(file.durable + random.below(unsynced + 1)),
                // The length came, the bytes did not, or not all.
                2 => file.bytes[file.durable..].fill(0),
                _ => {
                    for sector in file.bytes[file.durable..].chunks_mut(512) {
                        if random.below(2) == 0 {
                            sector.fill(0);
                        }
                    }
                }
            }
            file.durable = file.bytes.len();
        }
        for dir in world.dirs.values_mut() {
            let mut names = std::mem::take(&mut dir.durable);
            for (name, entry) in dir.pending.drain(..) {
                if random.below(2) == 0 {
                    continue;
                }
                match entry {
                    Some(entry) => names.insert(name, entry),
                    None => names.remove(&name),
                };
            }
            dir.now = names.clone();
            dir.durable = names;
        }
        // A directory whose name was lost is gone with what was in it.
        let dirs = world.dirs.clone();
        world.dirs.retain(|path, _| {
            let Some((parent, name)) = split(path) else { return true };
            dirs.get(parent).is_some_and(|dir| dir.now.contains_key(name))
        });
        (world.ops, world.cut_at, world.full_at, world.dead) = (0, None, None, false);
        world.mistake = Mistake::None;
        world.held.clear();
        Self(Arc::new(Mutex::new(world)))
    }

    /// All files, by path, with their bytes.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let world = self.lock();
        let mut files = BTreeMap::new();
        for (path, dir) in &world.dirs {
            for (name, entry) in &dir.now {
                if let Entry::File(file) = entry {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
                    files.insert(path, world.files[file].bytes.clone());
                }
            }
        }
        files
    }

    /// Puts other bytes into a file.
    pub fn overwrite(&self, path: &str, bytes: Vec<u8>) {
        let mut world = self.lock();
        let Ok(Entry::File(file)) = world.entry(path) else { panic!("no file {path}") };
        world.files.insert(file, File { durable: bytes.len(), bytes });
    }
}

/// Directory and name; none for the root.
fn split(path: &str) -> Option<(&str, &str)> {
    if path.is_empty() { None } else { Some(path.rsplit_once('/').unwrap_or(("", path))) }
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl World {
    fn entry(&self, path: &str) -> io::Result<Entry> {
        let Some((dir, name)) = split(path) else { return Ok(Entry::Dir) };
        let dir = self.dirs.get(dir).ok_or_else(|| errno(libc::ENOENT))?;
        dir.now.get(name).copied().ok_or_else(|| errno(libc::ENOENT))
    }

    fn dir(&mut self, path: &str) -> io::Result<&mut Dir> {
        self.dirs.get_mut(path).ok_or_else(|| errno(libc::ENOENT))
    }

    /// Counts an operation; whether it still takes effect. At the cut itself, chance has it.
    fn step(&mut self, needs_space: bool) -> io::Result<()> {
        if std::mem::take(&mut self.release) {
            for (from, to) in std::mem::take(&mut self.held) {
                self.step(false)?;
                self.rename(&from, &to)?;
                self.step(false)?;
                let (dir, _) = split(&to).expect("no root");
                self.sync_names(dir)?;
            }
        }
        if self.dead {
            return Err(errno(libc::EIO));
        }
        let op = self.ops;
        self.ops += 1;
        if self.cut_at.is_some_and(|at| op >= at) {
            self.dead = true;
            return Err(errno(libc::EIO));
        }
        if needs_space && self.full_at.is_some_and(|at| op >= at) {
            return Err(errno(libc::ENOSPC));
        }
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let entry = self.entry(from)?;
        if self.entry(to).is_ok() {
            return Err(errno(libc::EEXIST));
        }
        let ((old, name), (new, new_name)) = (split(from).expect("no root"), split(to).expect("no root"));
        self.dir(new)?.set(new_name, Some(entry));
        self.dir(old)?.set(name, None);
        Ok(())
    }

    fn sync_names(&mut self, dir: &str) -> io::Result<()> {
        let dir = self.dir(dir)?;
        dir.durable = dir.now.clone();
        dir.pending.clear();
        Ok(())
    }

    /// Whether the mistake is to publish this later, and whether it is what the held ones waited for.
    fn holds(&self, to: &str) -> (bool, bool) {
        let (pack, index, manifest) =
            (to.starts_with("packs/"), to.starts_with("index/"), to.starts_with("snapshots/"));
        match self.mistake {
            Mistake::IndexBeforePack => (pack, index),
            Mistake::ManifestFirst => (pack || index, manifest),
            _ => (false, false),
        }
    }
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sim")
    }
}

impl Storage for Sim {
    fn create(&self, path: &str, _: WriteHint) -> io::Result<Box<dyn WriteFile>> {
        let mut world = self.lock();
        world.step(true)?;
        if world.entry(path).is_ok() {
            return Err(errno(libc::EEXIST));
        }
        let id = world.next_file;
        world.next_file += 1;
        world.files.insert(id, File::default());
        let (dir, name) = split(path).expect("no root");
        world.dir(dir)?.set(name, Some(Entry::File(id)));
        Ok(Box::new(Handle { sim: self.clone(), id }))
    }

    fn open(&self, path: &str) -> io::Result<Arc<dyn ReadFile>> {
        match self.lock().entry(path)? {
            Entry::File(id) => Ok(Arc::new(Handle { sim: self.clone(), id })),
            Entry::Dir => Err(errno(libc::EISDIR)),
        }
    }

    fn publish(&self, from: &str, to: &str) -> io::Result<()> {
        let mut world = self.lock();
        let (hold, trigger) = world.holds(to);
        if hold {
            world.held.push((from.into(), to.into()));
            return Ok(());
        }
        world.step(true)?;
        world.rename(from, to)?;
        world.release |= trigger;
        Ok(())
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let mut world = self.lock();
        world.step(false)?;
        if world.mistake == Mistake::NoDirSync {
            return Ok(());
        }
        world.sync_names(dir)
    }

    fn create_dir(&self, path: &str) -> io::Result<()> {
        let mut world = self.lock();
        if world.entry(path).is_ok() {
            return Err(errno(libc::EEXIST));
        }
        world.step(true)?;
        let (dir, name) = split(path).expect("no root");
        world.dir(dir)?.set(name, Some(Entry::Dir));
        world.dirs.insert(path.into(), Dir::default());
        Ok(())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        Ok(self.lock().dir(dir)?.now.keys().cloned().collect())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        let mut world = self.lock();
        world.step(false)?;
        world.entry(path)?;
        let (dir, name) = split(path).expect("no root");
        world.dir(dir)?.set(name, None);
        Ok(())
    }

    fn describe(&self, path: &str) -> PathBuf {
        PathBuf::from("/sim").join(path)
    }
}

struct Handle {
    sim: Sim,
    id: u64,
}

impl Handle {
    fn with<T>(&self, world: &mut World, act: impl FnOnce(&mut File) -> T) -> T {
        act(world.files.get_mut(&self.id).expect("files stay"))
    }
}

impl WriteFile for Handle {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut world = self.sim.lock();
        let stepped = world.step(true);
        // What cannot be finished was begun.
        let part = if stepped.is_ok() { bytes } else { &bytes[..bytes.len() / 2] };
        if stepped.is_ok() || world.cut_at.is_some_and(|at| world.ops == at + 1) {
            self.with(&mut world, |file| file.bytes.extend_from_slice(part));
        }
        stepped
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut world = self.sim.lock();
        world.step(false)?;
        if world.mistake != Mistake::NoSyncBeforeRename {
            self.with(&mut world, |file| file.durable = file.bytes.len());
        }
        Ok(())
    }
}

impl ReadFile for Handle {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.with(&mut self.sim.lock(), |file| file.bytes.len()) as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut world = self.sim.lock();
        self.with(&mut world, |file| {
            let range = offset as usize..offset as usize + buf.len();
            let bytes = file.bytes.get(range).ok_or(io::ErrorKind::UnexpectedEof)?;
            buf.copy_from_slice(bytes);
            Ok(())
        })
    }
}

//! A scratch directory with a repository, and the program run in it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub(crate) struct Scratch {
    dir: tempfile::TempDir,
}

/// What a run said, and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    pub(crate) fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// Ended with the code for failures, and told all of `words` on stderr, in words and not in dumps.
    #[track_caller]
    pub(crate) fn fails(self, words: &[&str]) -> Self {
        let ran = self.ends_with(1);
        ran.tells(words)
    }

    #[track_caller]
    pub(crate) fn tells(self, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stderr.contains(word), "stderr lacks {word:?}: {self:#?}");
        }
        assert!(!self.stderr.contains("panicked") && !self.stderr.contains("{ "), "{self:#?}");
        self
    }

    /// Told this on stderr.
    #[track_caller]
    pub(crate) fn tells_of(&self, words: &str) {
        assert!(self.stderr.contains(words), "stderr lacks {words:?}: {self:#?}");
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

impl Scratch {
    /// An empty directory.
    pub(crate) fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A directory with an empty repository, `repo`.
    pub(crate) fn new() -> Self {
        let scratch = Self::empty();
        scratch.run(&["init"]).ends_with(0);
        scratch
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Copies a file or a directory, with all that it has.
    pub(crate) fn copy(&self, from: &str, to: &str) {
        let status = Command::new("cp").arg("-a").args([from, to].map(|name| self.path(name))).status();
        assert!(status.unwrap().success());
    }

    /// The program, to be run in the directory on its repository.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lifeboot"));
        command.args(args).current_dir(self.dir.path()).env("LIFEBOOT_REPO", "repo").stdin(Stdio::null());
        command
    }

    /// What runs a line of shell in the directory, on a terminal of its own that is written to stdout.
    pub(crate) fn on_a_terminal(&self, line: &str) -> Command {
        let mut script = Command::new("script");
        script.args(["-qec", line, "/dev/null"]).current_dir(self.dir.path()).env("SHELL", "/bin/sh");
        script
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).output().unwrap())
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let args = [args, &["--json"]].concat();
        self.run(&args).ends_with(0).json()
    }

    /// A sparse file of `len` bytes with runs of data, each `(offset, len, salt)`.
    pub(crate) fn disk(&self, name: &str, len: u64, runs: &[(u64, usize, u64)]) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(len).unwrap();
        for (offset, len, salt) in runs {
            file.write_all_at(&noise(*len, *salt), *offset).unwrap();
        }
        path
    }

    /// The names in a directory, sorted.
    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(dir)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// The only pack of the repository.
    pub(crate) fn pack(&self) -> PathBuf {
        let mut packs = self.packs();
        assert_eq!(packs.len(), 1, "{packs:?}");
        packs.remove(0)
    }

    /// All packs of the repository.
    pub(crate) fn packs(&self) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        walk(&self.path("repo/packs"), &mut found);
        found
    }
}

/// A live-restore to `t.raw`, so slow that it does not end by itself, once it is ready.
pub(crate) fn slow_live_restore(scratch: &Scratch) -> Child {
    live_restore(scratch, &["--limit", "20"])
}

/// A live-restore to `t.raw`, once it is ready.
pub(crate) fn live_restore(scratch: &Scratch, further: &[&str]) -> Child {
    live_restore_to(scratch, "t.raw", further)
}

/// A live-restore, once it is ready.
pub(crate) fn live_restore_to(scratch: &Scratch, target: &str, further: &[&str]) -> Child {
    let args = [&["live-restore", "web01@latest", target, "--listen", "unix:s"], further].concat();
    let mut child = scratch.command(&args).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // Whoever does not read on is no reason for it to end.
    assert!(lines.any(|line| line.unwrap().starts_with("ready: ")));
    child
}

/// Ends a live-restore, which goes on with the next start.
pub(crate) fn park(live: &mut Child) {
    kill_process(Pid::from_child(live), Signal::TERM).unwrap();
    assert!(live.wait().unwrap().success());
}

/// Bytes that do not compress, the same for the same salt.
pub(crate) fn noise(len: usize, salt: u64) -> Vec<u8> {
    let mut state = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[track_caller]
pub(crate) fn assert_same(a: &Path, b: &Path) {
    let same = Command::new("cmp").arg(a).arg(b).output().unwrap();
    assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
}

pub(crate) fn write(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all(bytes).unwrap();
}

/// Whether the tests run as root; those that mount or change their user need it.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

pub(crate) const MIB: u64 = 1 << 20;

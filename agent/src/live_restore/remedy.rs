//! What somebody can do about a session: commands that name it, whole, to be typed as they are.

use std::path::Path;

use rustix::fs::Access;

use super::advice::shell_line;
use super::record::SessionRecord;
use super::state_dir::{Sought, StateDir};
use crate::cli::Failure;

impl StateDir {
    /// `lifeboot VERB TARGET`, by which this session is found; `target` is its target where nobody has looked for it by one.
    pub(crate) fn command(&self, verb: &str, target: &Path) -> String {
        shell_line(&self.words(verb, target))
    }

    /// `lifeboot save TARGET`, as [`StateDir::command`] has it, for the session with this record: it goes for a target that is a copy,
    /// too.
    pub(crate) fn saving(&self, record: &SessionRecord) -> String {
        let target = self.target(record);
        let mut words = self.words("save", target);
        if record.identity.is_at(target) == Some(false) {
            words.push("--moved".to_owned());
        }
        shell_line(&words)
    }

    /// The target as somebody named it who looked for this session; else where it was when the session was started last. The
    /// record's is no name for it where it was copied or renamed since: that may be another session's target.
    pub(crate) fn target<'a>(&'a self, record: &'a SessionRecord) -> &'a Path {
        self.sought.as_ref().map_or(&record.target, |sought| &sought.target)
    }

    /// The same session, in commands that name its own directory where it is not beside its target: what is found by a target's path
    /// alone, or because nothing else fits, may be another one the next time.
    pub(crate) fn naming_directory(&self) -> Self {
        let path = std::path::absolute(self.path()).unwrap_or_else(|_| self.path().to_owned());
        let sought = self.sought.clone().map(|sought| {
            let is_beside = sought.root.is_none() && sought.target.is_file();
            Sought { root: if is_beside { None } else { Some(path) }, ..sought }
        });
        Self::at(self.path().to_owned()).with_sought(sought)
    }

    /// Whether the session here, of another target than stands at the path that was named, was only found by that path, below the state
    /// directory that was `named` or the usual one.
    pub(crate) fn is_found_by_path(&self, named: Option<&Path>) -> bool {
        let is_file = self.sought.as_ref().is_some_and(|sought| sought.target.is_file());
        let is_it = |named: &Path| named.canonicalize().ok() == self.path().canonicalize().ok();
        named.map_or(!is_file, |named| !is_it(named))
    }

    fn words(&self, verb: &str, target: &Path) -> Vec<String> {
        let (target, root) = match &self.sought {
            Some(Sought { target, root }) => (target.as_path(), root.as_deref()),
            None => (target, None),
        };
        let mut words = vec!["lifeboot".to_owned(), verb.to_owned(), target.display().to_string()];
        if let Some(root) = root {
            words.extend(["--state".to_owned(), root.display().to_string()]);
        }
        words
    }

    /// How the session is given up, as the end of an advice.
    pub(super) fn giving_up(&self) -> String {
        let Some(sought) = &self.sought else {
            return "`lifeboot discard TARGET` gives the session up".to_owned();
        };
        let command = self.command("discard", &sought.target);
        // Its files are removed from there.
        if rustix::fs::access(self.path(), Access::WRITE_OK | Access::EXEC_OK).is_ok() {
            format!("`{command}` gives the session up")
        } else {
            format!("`{command}`, as root or as the owner of {}, gives the session up", self.path().display())
        }
    }

    /// What to say where the session is there and cannot be gone on with.
    pub(super) fn unusable(&self, what: impl std::fmt::Display) -> Failure {
        Failure::new(
            what,
            format!(
                "the target may hold what a guest wrote: keep a copy of it; then {}, and a new one begins with --force",
                self.giving_up()
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_names_the_target_and_the_state_directory_as_a_shell_takes_them() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a b.raw");
        let beside = StateDir::of(&target, None).unwrap();
        let dir = dir.path().display();
        assert_eq!(beside.command("save", &target), format!("lifeboot save '{dir}/a b.raw'"));
        let elsewhere = StateDir::of(&target, Some(Path::new("/st'ate"))).unwrap();
        let command = format!(r"lifeboot discard '{dir}/a b.raw' --state '/st'\''ate'");
        assert_eq!(elsewhere.command("discard", &target), command);
    }
}

//! A file beside a target that says where its session is kept, and the session is not there: see `live_restore::pointer`.
//!
//! Whether it was removed by hand, or its file system is only not mounted, cannot be told from here. So what is given up is
//! that file alone: a session that comes back is found with `--state`, and its next start writes the file anew.

use std::path::Path;

use block::Engine;

use super::{Args, Report};
use crate::cli::{Context, Failure, Outcome};
use crate::live_restore::{self, LeftBehind};

impl Args {
    /// Removes that file, after the same question.
    pub(super) fn remove_left_behind(
        &self,
        context: &Context,
        path: &Path,
        left: &LeftBehind,
    ) -> anyhow::Result<Outcome> {
        let output = context.output();
        let interrupt = context.interrupt()?;
        let state = left.state();
        let (target, file, dir) = (path.display(), left.path(), state.path().display());
        let file = file.display();
        if self.remove_target {
            self.check_removable(None, path)?;
        }
        // An agent may serve it whose state directory cannot be seen from here.
        let _locked = path
            .exists()
            .then(|| live_restore::lock_target(&state, path, Engine::THREADS, &interrupt))
            .transpose()?;
        crate::boot::check_no_machine_of(path, Some(left.session()), state.path())?;
        self.check_may_change(
            &left.path().parent().map(Path::to_owned).into_iter().collect::<Vec<_>>(),
            path,
        )?;
        output.forewarn(format_args!(
            "the session of {target} is kept in {dir}, as {file} says, and is not there: if its file system is only not mounted, \
             mount it and discard nothing"
        ))?;
        output.forewarn(format_args!(
            "lost is what that file tells: that {target} may be only part of a disk, and where the rest was known"
        ))?;
        self.ask(output, &interrupt, "give --yes, once it is certain that the session is gone for good")?;
        interrupt.check()?;
        if !left.remove()? {
            return Err(Failure::new(
                format_args!("nothing was discarded: {file} has changed while this was asked, or the session is there again"),
                "run the same command again: it says what would be lost now",
            )
            .into());
        }
        let report = Report { discarded: true, session: Some(left.session()), ..Report::of_nothing(path) };
        let what = format!("{file} is removed");
        let became = if path.exists() {
            format!("{target} stays as it is")
        } else {
            format!("{target} does not exist")
        };
        let told = output.document(&report).and_then(|()| output.line(format_args!("{what}; {became}")));
        Outcome::Done.once_told(told, what, became)
    }
}

//! `lifeboot completions` and `lifeboot man`: files for the shell and for `man`, made from the command line itself.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory;

use super::{Cli, Context, Outcome, Verb};

/// Print the completion script of a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  lifeboot completions bash > /etc/bash_completion.d/lifeboot")]
pub(super) struct CompletionsArgs {
    /// Which shell
    shell: clap_complete::Shell,
}

impl Verb for CompletionsArgs {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "lifeboot", &mut script);
        context.output().stdout(&script)?;
        Ok(Outcome::Done)
    }
}

/// Write the man pages of all verbs into a directory
#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Where to; made if it does not exist
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Verb for ManArgs {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let dir = &self.dir;
        std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the directory {}", dir.display()))?;
        let pages = man_pages().context("cannot generate the man pages")?;
        for (name, page) in &pages {
            let path = dir.join(name);
            std::fs::File::create(&path)
                .and_then(|mut file| file.write_all(page))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        context.output().document(&pages.iter().map(|(name, _)| name).collect::<Vec<_>>())?;
        context.output().line(format_args!("wrote {} man pages to {}", pages.len(), dir.display()))?;
        Ok(Outcome::Done)
    }
}

/// Each page with its file name: `lifeboot.1`, `lifeboot-capture.1`, …
fn man_pages() -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut command = Cli::command().disable_help_subcommand(true);
    // Fills in the full names ("lifeboot-capture") and the global options of each verb.
    command.build();
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned().collect::<Vec<_>>();
    std::iter::once(command)
        .chain(verbs)
        .map(|command| {
            let notes = command.get_after_help().map(ToString::to_string);
            let man = clap_mangen::Man::new(command.after_help(None));
            let mut page = Vec::new();
            man.render(&mut page)?;
            if let Some(notes) = notes {
                page.extend_from_slice(notes_section(&notes).as_bytes());
            }
            Ok((man.get_filename(), page))
        })
        .collect()
}

/// What `--help` ends with, line by line: a command in an example must not be filled and justified.
fn notes_section(notes: &str) -> String {
    let mut section = ".SH NOTES\n.nf\n".to_owned();
    for line in notes.lines() {
        // A line that begins like a request of roff is none.
        let guard = if line.starts_with(['.', '\'']) { "\\&" } else { "" };
        section.push_str(&format!("{guard}{}\n", line.replace('\\', "\\e").replace('-', "\\-")));
    }
    section + ".fi\n"
}

//! `lifeboot init`: makes an empty repository.

use repository::{InitOptions, Repository};
use serde::Serialize;

use super::{Context, Outcome, Size, UsageError, Verb};

/// Make an empty repository
///
/// The directory is made if it does not exist (its parent must); one that holds anything is refused.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Bytes of a chunk where a capture does not ask for another size: 64KiB to 4MiB, a power of two
    #[arg(long, value_name = "SIZE", default_value_t = Size(u64::from(repository::DEFAULT_CHUNK_SIZE)))]
    chunk_size: Size,
}

#[derive(Serialize)]
struct Report<'a> {
    repository: std::path::PathBuf,
    id: &'a str,
    format_version: u32,
    chunk_size_bytes: u32,
}

impl Verb for Args {
    fn run(self, context: &Context) -> anyhow::Result<Outcome> {
        let path = context.repository_path()?;
        let chunk_size = self.chunk_size.chunk_size()?;
        let repository = Repository::init(&path, InitOptions { chunk_size })?;
        let config = repository.config();
        let report = Report {
            repository: repository.path(),
            id: &config.id,
            format_version: u32::from(repository::FORMAT_VERSION),
            chunk_size_bytes: config.chunk_size,
        };
        let (output, path) = (context.output(), path.display());
        let told =
            output.document(&report).and_then(|()| output.line(format_args!("made a repository in {path}")));
        Outcome::Done.once_told(
            told,
            format_args!("the repository {path} was made"),
            "use it: `lifeboot capture` takes the first snapshot",
        )
    }
}

impl Size {
    /// The size as that of a chunk.
    ///
    /// # Errors
    /// [`UsageError`] for what no chunk can have.
    pub(crate) fn chunk_size(self) -> Result<u32, UsageError> {
        let (smallest, largest) = (repository::MIN_CHUNK_SIZE, repository::MAX_CHUNK_SIZE);
        u32::try_from(self.0)
            .ok()
            .filter(|size| size.is_power_of_two() && (smallest..=largest).contains(size))
            .ok_or_else(|| {
                let (smallest, largest) = (Self(smallest.into()), Self(largest.into()));
                UsageError::new(format_args!(
                    "a chunk cannot have {self}: its size is a power of two from {smallest} to {largest}"
                ))
            })
    }
}

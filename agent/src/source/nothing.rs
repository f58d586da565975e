//! The source of a disk that is wholly home: nothing is fetched from it any more, so it needs no repository.

use crate::live::{ChunkData, ChunkSource, DiskLayout, FetchFuture, SourceError, SourceErrorKind, Urgency};

/// A source that has nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoSource(DiskLayout);

impl NoSource {
    /// For a disk of this layout.
    #[must_use]
    pub const fn new(layout: DiskLayout) -> Self {
        Self(layout)
    }
}

impl ChunkSource for NoSource {
    fn layout(&self) -> DiskLayout {
        self.0
    }

    fn is_zero(&self, _: u64) -> bool {
        false
    }

    fn fetch(&self, chunk: u64, _: Urgency) -> FetchFuture<'_, Result<ChunkData, SourceError>> {
        let error = SourceError::new(
            SourceErrorKind::Closed,
            format_args!("chunk {chunk} was asked for, though the disk is wholly home"),
        );
        Box::pin(std::future::ready(Err(error)))
    }
}

//! From a chunk's stored bytes to the chunk, verified; from a copy of the repository where they are wrong.

use repository::{ChunkDecoder, ChunkId, Repository};

use super::fallback::Fallbacks;
use super::fetched::Fetched;
use super::repository_store::ChunkPlace;
use super::troubles::kind_of;
use super::{Decode, Undecoded};
use crate::live::{SourceError, SourceErrorKind};

/// Decodes and verifies for one thread.
pub struct RepositoryDecoder {
    decoder: repository::Result<ChunkDecoder>,
    repository: Repository,
    fallbacks: Fallbacks,
    fetched: Fetched,
}

impl RepositoryDecoder {
    /// It calls `pause` between pieces of its work.
    pub(super) fn new(
        pause: impl FnMut() + Send + 'static,
        repository: Repository,
        fallbacks: Fallbacks,
        fetched: Fetched,
    ) -> Self {
        let decoder = ChunkDecoder::new().map(|decoder| decoder.with_pauses(pause));
        Self { decoder, repository, fallbacks, fetched }
    }
}

impl Decode<ChunkPlace> for RepositoryDecoder {
    fn decode_each(&mut self, chunks: &mut [Undecoded<'_, ChunkPlace>]) -> Vec<Result<(), SourceError>> {
        let decoder = match &mut self.decoder {
            Ok(decoder) => decoder,
            Err(error) => {
                let why = || SourceError::new(SourceErrorKind::Unavailable, error.clone());
                return chunks.iter().map(|_| Err(why())).collect();
            }
        };
        let mut undecoded: Vec<_> = chunks
            .iter_mut()
            .map(|chunk| repository::Undecoded {
                at: &chunk.place.location,
                stored: chunk.stored,
                id: &chunk.place.id,
                out: chunk.out,
            })
            .collect();
        let results = decoder.decode_each(&mut undecoded);
        let (repository, fallbacks) = (&self.repository, &self.fallbacks);
        let ended = chunks.iter_mut().zip(results).map(|(chunk, result)| match (result, chunk.place.copy) {
            (Ok(()), None) => Ok(()),
            (Ok(()), Some(copy)) => {
                let why = "the repository was out of reach, or a pack was not there";
                fallbacks.copies()[copy].note(chunk.out.len(), &why);
                Ok(())
            }
            (Err(error), _) if fallbacks.is_empty() => Err(SourceError::new(SourceErrorKind::Damaged, error)),
            (Err(_), _) => from_anybody(repository, fallbacks, decoder, &chunk.place.id, chunk.out),
        });
        let ended: Vec<_> = ended.collect();
        for (chunk, _) in chunks.iter().zip(&ended).filter(|(_, result)| result.is_ok()) {
            self.fetched.add_plain(chunk.place.disk, chunk.out.len());
        }
        ended
    }
}

/// A chunk by its id, from whoever has it. Where nobody does, what the repository says of it counts; but it is not damaged
/// for good while a copy may still give it.
fn from_anybody(
    repository: &Repository,
    fallbacks: &Fallbacks,
    decoder: &mut ChunkDecoder,
    id: &ChunkId,
    out: &mut [u8],
) -> Result<(), SourceError> {
    let Err(why) = repository.read_chunk(id, decoder, out) else { return Ok(()) };
    let Err(others) = fallbacks.rescue(id, decoder, out, &why) else { return Ok(()) };
    let is_final = |(copy, error)| kind_of(copy, error) == SourceErrorKind::Damaged;
    let copies = fallbacks.copies().iter().map(|copy| &copy.repository);
    let kind = match kind_of(repository, &why) {
        SourceErrorKind::Damaged if !copies.zip(&others).all(is_final) => SourceErrorKind::Missing,
        kind => kind,
    };
    Err(SourceError::new(kind, fallbacks.and_they_said(why, &others)))
}

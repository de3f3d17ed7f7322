//! The first two stages without an engine behind them, for measuring.

use std::ops::ControlFlow;

use super::*;
use crate::limits::CHUNK_ROWS;

/// Reads and prepares rows as a job does, and hands them to `take` until it has enough. Nothing is limited but the number of
/// chunks.
///
/// # Errors
/// The shard cannot be read.
pub(crate) async fn prepare_alone(
    input: impl Rows,
    (images, columns): (&Images, &Columns),
    preparer: &Preparer,
    mut take: impl FnMut(Prepared) -> ControlFlow<()>,
) -> Result<()> {
    let tickets = Arc::new(Semaphore::new(chunks_max(CHUNK_ROWS)));
    let (to_prepare, chunks) = channel(CHUNKS_READ);
    let (to_taker, mut prepared) = channel(CHUNKS_PREPARED);
    let budget = Budget::default();
    let reading = read(input, tickets, (images, columns), (&budget, preparer.pixel_bytes()), to_prepare);
    let preparing = prepare(preparer, columns, None, chunks, to_taker);
    let taking = async move {
        while let Some(chunk) = prepared.recv().await {
            if take(chunk).is_break() {
                break;
            }
        }
    };
    let (read, prepared, ()) = tokio::join!(reading, preparing, taking);
    read?;
    prepared?;
    Ok(())
}

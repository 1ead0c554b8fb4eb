//! What somebody asks of the threads behind and waits for.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::error::CommitError;
use crate::id::SegmentId;
use crate::maintain;
use crate::part::Part;
use crate::volume::{Inner, Volume};

/// How often a waiter looks.
const STEP: Duration = Duration::from_millis(5);

fn failed(why: impl ToString) -> CommitError {
    CommitError::Io { errno: rustix::io::Errno::IO.raw_os_error(), message: why.to_string() }
}

/// Is nobody left who waits? Asked often.
pub type Cancelled<'a> = &'a (dyn Fn() -> bool + Sync);

fn step(cancelled: Cancelled<'_>) -> Result<(), CommitError> {
    if cancelled() {
        return Err(CommitError::Cancelled);
    }
    std::thread::sleep(STEP);
    Ok(())
}

fn pending(inner: &Inner) -> u64 {
    let collections: Vec<_> = inner.collections.read().values().cloned().collect();
    collections.iter().flat_map(|collection| Vec::clone(&collection.parts.load())).map(|part| part.pending()).sum()
}

impl Volume {
    /// Waits until all that was pending when this was called is in a graph, and durable. An error if what is behind
    /// failed meanwhile, or if who waits is gone.
    pub fn settle(&self, cancelled: Cancelled<'_>) -> Result<(), CommitError> {
        let inner = &*self.inner;
        let _waiting = inner.background.wait_for();
        let before = inner.failures.load(Ordering::Acquire);
        for thread in &self.threads {
            thread.thread().unpark();
        }
        inner.wake();
        while pending(inner) > 0 {
            let tended = inner.tended.load(Ordering::Acquire);
            if !tended || inner.failures.load(Ordering::Acquire) != before {
                return Err(failed(inner.last_error.lock().clone().unwrap_or_default()));
            }
            step(cancelled)?;
        }
        inner.commit()
    }

    /// Makes one segment of each collection, without dead rows. With `purge` the bytes of what was removed before this
    /// was called are in no file of the state directory when it returns. An error if who waits is gone: what was done
    /// until then stays.
    pub fn optimize(&self, purge: bool, cancelled: Cancelled<'_>) -> Result<(), CommitError> {
        let inner = &*self.inner;
        let _waiting = inner.background.wait_for();
        let _alone = loop {
            match inner.rewriting.try_lock() {
                Some(alone) => break alone,
                None => step(cancelled)?,
            }
        };
        let go_on = |_| !inner.stop.load(Ordering::Acquire) && !cancelled();
        let collections: Vec<_> = inner.collections.read().values().cloned().collect();
        for collection in collections {
            let head = collection.head().map_or(0, |head| head.live_points());
            let others = collection.parts.load().len().saturating_sub(1);
            if head > 0 && others > 0 || head >= maintain::SEAL_AT_CLOSE {
                maintain::freeze(inner, &collection);
            }
            let inputs = Vec::from(collection.parts.load().get(1..).unwrap_or_default());
            let compact = |parts: &[std::sync::Arc<Part>]| match parts {
                [] => true,
                [one] => one.as_segment().is_some() && one.ended_points() == 0,
                _ => false,
            };
            if !compact(&inputs) && !maintain::rewrite(inner, &collection, &inputs, &go_on).map_err(failed)? {
                return Err(if cancelled() {
                    CommitError::Cancelled
                } else {
                    failed("it was interrupted, or a segment was given up")
                });
            }
        }
        inner.commit()?;
        if purge {
            self.purge()?;
        }
        Ok(())
    }

    /// Removes the files of segments that nothing names, and the catalog's free pages.
    fn purge(&self) -> Result<(), CommitError> {
        let inner = &*self.inner;
        let collections: Vec<_> = inner.collections.read().values().cloned().collect();
        let named: Vec<String> = collections
            .iter()
            .flat_map(|collection| Vec::clone(&collection.parts.load()))
            .filter_map(|part| part.as_segment().map(|segment| segment.id))
            .map(SegmentId::path)
            .collect();
        for name in inner.disk.list("segments").map_err(failed)? {
            let path = format!("segments/{name}");
            if !named.contains(&path) {
                inner.disk.remove(&path).map_err(failed)?;
            }
        }
        if !named.is_empty() {
            inner.disk.sync_dir("segments").map_err(failed)?;
        }
        inner.catalog.lock().compact()
    }
}

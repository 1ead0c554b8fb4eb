//! What is told to the work behind, and how far it is: see decision 15.
//!
//! Whatever is done behind asks [`Background::go_on`] before each step, and is held there while it is to pause or has read
//! and written faster than it may; but never while somebody waits for it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::id::CollectionId;
use crate::sync::{AtomicU64, Condvar, Mutex};

/// How often what is held looks whether the volume ends.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How far work may be ahead of its rate, so that it doesn't sleep at each block.
const AHEAD: Duration = Duration::from_millis(20);

/// What one rewriting does.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A segment of points that were in none.
    Seal,
    /// One segment of several.
    Merge,
    /// A segment without the dead rows of the one before.
    Compact,
}

/// A rewriting that goes on.
#[derive(Copy, Clone)]
pub(crate) struct Work {
    pub kind: Kind,
    pub collection: CollectionId,
    pub points: u64,
    pub since: Instant,
}

struct Told {
    paused: bool,
    /// Bytes a second; 0 for as many as there are.
    rate: u64,
    /// When what was read and written would be done at that rate.
    even_at: Instant,
    work: Option<Work>,
}

/// See the module.
pub(crate) struct Background {
    told: Mutex<Told>,
    changed: Condvar,
    /// Is there anything that holds back? Or all may go on without the lock.
    holds: AtomicBool,
    /// Those who wait for what is done behind.
    waiting: AtomicUsize,
    /// Rows that the rewriting has linked.
    linked: AtomicU64,
}

/// Somebody waits: as long as this lives nothing is held back.
pub(crate) struct Waiter<'a>(&'a Background);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A rewriting goes on as long as this lives.
pub(crate) struct Working<'a>(&'a Background);

impl Working<'_> {
    /// Another row is linked.
    pub fn linked(&self) {
        self.0.linked.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.told.lock().work = None;
    }
}

impl Background {
    pub fn new(rate: u64) -> Background {
        Background {
            told: Mutex::new(Told { paused: false, rate, even_at: Instant::now(), work: None }),
            changed: Condvar::new(),
            holds: AtomicBool::new(rate > 0),
            waiting: AtomicUsize::new(0),
            linked: AtomicU64::new(0),
        }
    }

    fn tell(&self, change: impl FnOnce(&mut Told)) {
        let mut told = self.told.lock();
        change(&mut told);
        self.holds.store(told.paused || told.rate > 0, Ordering::Release);
        self.changed.notify_all();
    }

    pub fn pause(&self, paused: bool) {
        self.tell(|told| told.paused = paused);
    }

    pub fn set_rate(&self, rate: u64) {
        self.tell(|told| {
            told.rate = rate;
            told.even_at = Instant::now();
        });
    }

    pub fn is_paused(&self) -> bool {
        self.told.lock().paused
    }

    /// Bytes a second, if they are bounded.
    pub fn rate(&self) -> Option<u64> {
        Some(self.told.lock().rate).filter(|rate| *rate > 0)
    }

    /// The rewriting that goes on, and the rows of it that are linked.
    pub fn work(&self) -> Option<(Work, u64)> {
        let work = self.told.lock().work?;
        Some((work, self.linked.load(Ordering::Relaxed).min(work.points)))
    }

    /// A rewriting begins.
    pub fn begin(&self, work: Work) -> Working<'_> {
        self.linked.store(0, Ordering::Relaxed);
        self.told.lock().work = Some(work);
        Working(self)
    }

    /// Somebody is about to wait.
    pub fn wait_for(&self) -> Waiter<'_> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        self.wake();
        Waiter(self)
    }

    /// Does somebody wait for what is done behind?
    pub fn is_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// What is held looks again.
    pub fn wake(&self) {
        let _told = self.told.lock();
        self.changed.notify_all();
    }

    /// To be asked before each step of what is done behind, with the bytes that the last one read and wrote. Waits as long as
    /// that is to be held back; false if the volume ends.
    pub fn go_on(&self, stop: &AtomicBool, bytes: usize) -> bool {
        let stopped = || stop.load(Ordering::Acquire);
        if self.holds.load(Ordering::Acquire) && !self.is_waited_for() {
            let mut told = self.told.lock();
            if told.rate > 0 {
                let takes = Duration::from_secs_f64(bytes as f64 / told.rate as f64);
                told.even_at = told.even_at.max(Instant::now()) + takes;
            }
            while !stopped() && !self.is_waited_for() {
                let ahead = match told.rate {
                    0 => Duration::ZERO,
                    _ => told.even_at.saturating_duration_since(Instant::now()),
                };
                if !told.paused && ahead <= AHEAD {
                    break;
                }
                let most = if told.paused { LOOK_EVERY } else { LOOK_EVERY.min(ahead) };
                self.changed.wait_for(&mut told, most);
            }
        }
        !stopped()
    }
}

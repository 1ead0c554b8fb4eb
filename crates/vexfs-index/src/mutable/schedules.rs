//! The mutable index over shuttle's atomics and locks, in many random schedules.
//!
//! The module is compiled a second time, as it is; only `sync` is another.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Effort, Element, Index, Metric, Params, Request, Scratch, Slot, Space};

mod sync {
    pub use shuttle::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
    pub use shuttle::sync::{Mutex, MutexGuard};

    /// Words as `raw::Words` has them.
    pub struct Words(Vec<AtomicU32>);

    impl Words {
        pub fn zeroed(words: usize) -> Option<Words> {
            Some(Words((0..words).map(|_| AtomicU32::new(0)).collect()))
        }
        pub fn get(&self) -> &[AtomicU32] {
            &self.0
        }
    }
}

#[path = "mod.rs"]
#[allow(clippy::duplicate_mod, dead_code, unused_imports, reason = "what only users of the library use")]
mod mutable;

use mutable::Mutable;

/// Runs `body` in so many random schedules and prints how many those were.
fn explore(name: &str, schedules: usize, body: impl Fn() + Send + Sync + 'static) {
    static RUN: AtomicUsize = AtomicUsize::new(0);
    let before = RUN.load(Ordering::SeqCst);
    shuttle::check_random(
        move || {
            RUN.fetch_add(1, Ordering::SeqCst);
            body();
        },
        schedules,
    );
    eprintln!("{name}: {} schedules", RUN.load(Ordering::SeqCst) - before);
}

fn head() -> Mutable {
    let space = Space::new(2, Metric::L2, Element::U8).unwrap();
    Mutable::scanning_below(0, space, Params { m: 2, ef_construction: 4, ..Params::default() })
}

/// Each slot has a row of its own, so a distance tells whose it is.
fn row(slot: u32) -> [u8; 2] {
    [(slot * 7 % 50) as u8, slot as u8]
}

fn check(hits: &[crate::Neighbor], query: &[f32], dead: &[u32]) {
    for hit in hits {
        let row = row(hit.slot.0);
        let distance: f32 = row.iter().zip(query).map(|(a, b)| (f32::from(*a) - b) * (f32::from(*a) - b)).sum();
        assert_eq!(hit.distance, distance, "{:?} has another's distance", hit.slot);
        assert!(!dead.contains(&hit.slot.0), "{:?} was deleted before", hit.slot);
    }
}

/// One thread fills what another deletes and takes out; a third asks.
#[test]
fn recycled_nodes_are_never_seen_as_what_they_were() {
    explore("recycling", 1_500, || {
        let head = Arc::new(head());
        let mut scratch = Scratch::default();
        for slot in 0..4 {
            head.push(&row(slot));
            head.link(Slot(slot), &mut scratch);
        }
        assert!(head.delete(Slot(0)));
        let deleting = {
            let head = Arc::clone(&head);
            shuttle::thread::spawn(move || {
                let mut scratch = Scratch::default();
                assert!(head.delete(Slot(2)));
                head.tidy(&mut scratch);
                assert!(head.delete(Slot(1)));
                head.tidy(&mut scratch);
            })
        };
        let pushing = {
            let head = Arc::clone(&head);
            shuttle::thread::spawn(move || {
                let mut scratch = Scratch::default();
                for slot in 4..7 {
                    assert_eq!(head.push(&row(slot)), Slot(slot));
                    head.link(Slot(slot), &mut scratch);
                }
            })
        };
        let (mut out, query) = (Vec::new(), [9.0, 3.0]);
        for exact in [false, true, false] {
            let request = Request { exact, effort: Effort::Ef(3), ..Request::nearest(3) };
            head.search(&query, &request, &mut scratch, &mut out).unwrap();
            check(&out, &query, &[0]);
        }
        deleting.join().unwrap();
        pushing.join().unwrap();
        head.search(&query, &Request { exact: true, ..Request::nearest(9) }, &mut scratch, &mut out).unwrap();
        check(&out, &query, &[0, 1, 2]);
        assert_eq!(out.len(), 4);
        head.tidy(&mut scratch);
        let reach = head.reach();
        assert_eq!((reach.points, reach.unreachable, reach.stale), (4, 0, 0));
        // What was pushed after the nodes came back took them.
        let before = head.memory().vectors;
        head.tidy(&mut scratch);
        head.push(&row(7));
        assert_eq!(head.memory().vectors, before);
    });
}

/// A point is deleted while it is linked, while its neighbours are, and while the graph is swept.
#[test]
fn no_link_leads_to_a_deleted_point_for_ever() {
    explore("linking beside deleting", 1_500, || {
        let head = Arc::new(head());
        let mut scratch = Scratch::default();
        for slot in 0..6 {
            head.push(&row(slot));
        }
        (0..3).for_each(|slot| head.link(Slot(slot), &mut scratch));
        let threads: Vec<_> = [[3, 4, 5], [5, 4, 3]]
            .into_iter()
            .map(|slots| {
                let head = Arc::clone(&head);
                shuttle::thread::spawn(move || {
                    let mut scratch = Scratch::default();
                    slots.into_iter().for_each(|slot| head.link(Slot(slot), &mut scratch));
                })
            })
            .collect();
        // One that is linked, one that is being linked; the entry point is among those before long.
        assert!(head.delete(Slot(4)));
        assert!(head.delete(Slot(0)));
        head.tidy(&mut scratch);
        assert!(head.delete(Slot(1)));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        head.tidy(&mut scratch);
        let reach = head.reach();
        assert_eq!((reach.points, reach.unreachable, reach.stale), (3, 0, 0));
        assert_eq!((head.live(), head.pending(), head.first_pending()), (3, 0, Slot(6)));
        let (mut out, query) = (Vec::new(), [1.0, 1.0]);
        head.search(&query, &Request { effort: Effort::Ef(3), ..Request::nearest(3) }, &mut scratch, &mut out).unwrap();
        check(&out, &query, &[0, 1, 4]);
        assert_eq!(out.len(), 3);
    });
}

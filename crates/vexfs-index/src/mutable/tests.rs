//! The mutable index against a plain model, and with threads beside each other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use proptest::prelude::*;

use crate::tests::{Random, data};
use crate::*;

/// The nearest, ties by slot, of all that the model holds.
fn nearest(space: &Space, model: &BTreeMap<u32, Vec<u8>>, query: &[f32], k: usize) -> Vec<Neighbor> {
    let mut all: Vec<Neighbor> =
        model.iter().map(|(slot, row)| Neighbor { slot: Slot(*slot), distance: space.distance(query, row) }).collect();
    all.sort_by(|a, b| a.distance.total_cmp(&b.distance).then(a.slot.cmp(&b.slot)));
    all.truncate(k);
    all
}

#[derive(Clone, Debug)]
enum Step {
    Push(Vec<i8>),
    Link(usize),
    Delete(usize),
    Update(usize, Vec<i8>),
    Tend,
    Tidy,
}

fn row() -> impl Strategy<Value = Vec<i8>> {
    // Few values, so that there are equal points and equal distances.
    proptest::collection::vec(-3i8..4, 3)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => row().prop_map(Step::Push),
        6 => any::<usize>().prop_map(Step::Link),
        4 => any::<usize>().prop_map(Step::Delete),
        1 => (any::<usize>(), row()).prop_map(|(at, row)| Step::Update(at, row)),
        1 => Just(Step::Tend),
        1 => Just(Step::Tidy),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn a_head_is_its_model_after_every_step(steps in proptest::collection::vec(step(), 1..250), query in row()) {
        let space = Space::new(3, Metric::L2, Element::I8).unwrap();
        // Nothing is so small that it is scanned.
        let params = Params { m: 3, ef_construction: 8, ..Params::default() };
        let head = Mutable::scanning_below(0, space, params);
        let (mut scratch, mut out) = (Scratch::default(), Vec::new());
        let mut model: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
        let mut slots = 0;
        let query: Vec<f32> = query.iter().map(|v| f32::from(*v)).collect();
        let bytes = |row: &[i8]| row.iter().map(|v| *v as u8).collect::<Vec<u8>>();
        for step in steps {
            // Of a slot that was given out, dead or alive.
            let pick = |at: usize| Slot((at % slots.max(1)) as u32);
            match step {
                Step::Push(row) => {
                    prop_assert_eq!(head.push(&bytes(&row)), Slot(slots as u32), "slots are given out once");
                    model.insert(slots as u32, bytes(&row));
                    slots += 1;
                }
                Step::Link(at) => head.link(pick(at), &mut scratch),
                Step::Delete(at) => {
                    let slot = pick(at);
                    prop_assert_eq!(head.delete(slot), model.remove(&slot.0).is_some());
                }
                Step::Update(at, row) => {
                    let slot = pick(at);
                    let new = head.update(slot, &bytes(&row));
                    prop_assert_eq!(new.is_some(), model.remove(&slot.0).is_some());
                    slots = head.len();
                    if let Some(new) = new {
                        model.insert(new.0, bytes(&row));
                    }
                }
                Step::Tend => head.tend(&mut scratch),
                Step::Tidy => {
                    head.tidy(&mut scratch);
                    let reach = head.reach();
                    prop_assert_eq!((reach.unreachable, reach.stale), (0, 0), "of {}", reach.points);
                }
            }
            prop_assert_eq!(head.live(), model.len());
            let exact = Request { exact: true, ..Request::nearest(4) };
            head.search(&query, &exact, &mut scratch, &mut out).unwrap();
            prop_assert_eq!(&out, &nearest(&space, &model, &query, 4));
            head.search(&query, &Request { effort: Effort::Ef(4), ..Request::nearest(4) }, &mut scratch, &mut out).unwrap();
            prop_assert_eq!(out.len(), model.len().min(4), "as many as there are");
            for hit in &out {
                let row = model.get(&hit.slot.0);
                prop_assert!(row.is_some(), "{:?} is deleted", hit.slot);
                prop_assert_eq!(row.map(|row| space.distance(&query, row)), Some(hit.distance));
            }
        }
        let mut read = Vec::new();
        for slot in 0..slots as u32 {
            prop_assert_eq!(head.read(Slot(slot), &mut read).then_some(&read), model.get(&slot));
        }
    }
}

/// Share of the true hits among living points that a search finds.
fn recall(head: &Mutable, queries: &[Vec<f32>], request: &Request<'_>) -> f64 {
    let (mut scratch, mut truth, mut found) = (Scratch::default(), Vec::new(), Vec::new());
    let (mut right, mut all) = (0, 0);
    for query in queries {
        head.search(query, &Request { exact: true, ..request.clone() }, &mut scratch, &mut truth).unwrap();
        head.search(query, request, &mut scratch, &mut found).unwrap();
        let limit = truth.last().map_or(0.0, |hit| hit.distance);
        right += found.iter().filter(|hit| hit.distance <= limit).count();
        all += truth.len();
    }
    right as f64 / all as f64
}

#[test]
fn recall_does_not_fall_with_churn_and_memory_is_used_again() {
    let space = Space::new(16, Metric::L2, Element::F32).unwrap();
    let n = 2_000;
    let (rows, queries) = data(&space, n * 6, 31);
    let params = Params { ef_construction: 60, ..Params::default() };
    let mut rows = rows.chunks_exact(space.row_bytes());
    let mut scratch = Scratch::default();
    let grow = |head: &Mutable, rows: &mut dyn Iterator<Item = &[u8]>, live: &mut Vec<Slot>, scratch: &mut Scratch| {
        for row in rows {
            let slot = head.push(row);
            head.link(slot, scratch);
            head.tend(scratch);
            live.push(slot);
        }
    };
    let head = Mutable::scanning_below(100, space, params.clone());
    let mut live = Vec::new();
    grow(&head, &mut rows.by_ref().take(n), &mut live, &mut scratch);
    let request = Request { effort: Effort::Ef(24), ..Request::nearest(10) };
    let before = recall(&head, &queries, &request);
    let memory = head.memory().vectors;
    let mut random = Random(5);
    for _ in 0..10 {
        for _ in 0..n / 2 {
            assert!(head.delete(live.swap_remove(random.next() as usize % live.len())));
            head.tend(&mut scratch);
        }
        grow(&head, &mut rows.by_ref().take(n / 2), &mut live, &mut scratch);
    }
    head.tidy(&mut scratch);
    let reach = head.reach();
    assert_eq!(reach, Reach { points: n, unreachable: 0, stale: 0 });
    let after = recall(&head, &queries, &request);
    assert!(after >= before - 0.02, "{before} before, {after} after ten rounds");
    assert!(head.memory().vectors <= memory * 5 / 4, "{memory} bytes before, {} after", head.memory().vectors);
}

#[test]
fn a_recall_target_is_met_on_what_the_head_holds() {
    let space = Space::new(20, Metric::Cosine, Element::F32).unwrap();
    let (rows, _) = data(&space, 6_300, 17);
    let params = Params { m: 6, ef_construction: 40, ..Params::default() };
    let head = Mutable::scanning_below(1_000, space, params);
    let (mut scratch, mut queries) = (Scratch::default(), Vec::new());
    for (n, row) in rows.chunks_exact(space.row_bytes()).enumerate() {
        if n.is_multiple_of(21) {
            let mut query = Vec::new();
            space.decode(row, &mut query);
            queries.push(query);
        } else {
            head.link(head.push(row), &mut scratch);
            head.tend(&mut scratch);
        }
    }
    let recalls = [0.8, 0.9, 0.99].map(|target| {
        let request = Request { effort: Effort::Recall(target), ..Request::nearest(10) };
        recall(&head, &queries, &request)
    });
    assert!(recalls.is_sorted() && recalls[0] < recalls[2], "more is found for more: {recalls:?}");
    assert!(recalls[1] >= 0.88 && recalls[2] >= 0.98, "{recalls:?}");
}

/// A row that says which slot it was pushed for: searches that mix two points up are found out.
fn marked(number: u32) -> [u8; 8] {
    std::array::from_fn(|at| (number.wrapping_mul(0x9e37_79b9).rotate_left(at as u32 * 4) & 0x7f) as u8)
}

#[test]
fn searches_beside_inserts_and_deletes_return_what_is_there() {
    let space = Space::new(8, Metric::L2, Element::U8).unwrap();
    let params = Params { m: 5, ef_construction: 24, ..Params::default() };
    let head = Mutable::scanning_below(64, space, params);
    let rounds = 3_000;
    // Slot n % 3 == 0 stays for ever; the others go. `gone[n]` is set after its delete returned.
    let gone: Vec<AtomicBool> = (0..3 * rounds).map(|_| AtomicBool::new(false)).collect();
    // By slot the row's number, so that a hit can be checked; written before the push is linked.
    let rows: Vec<AtomicUsize> = (0..3 * rounds).map(|_| AtomicUsize::new(usize::MAX)).collect();
    let (stop, asked, next) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut scratch = Scratch::default();
                    let mut mine = std::collections::VecDeque::new();
                    while next.load(Ordering::SeqCst) < rounds {
                        let number = next.fetch_add(1, Ordering::SeqCst);
                        let slot = head.push(&marked(number as u32));
                        rows[slot.0 as usize].store(number, Ordering::SeqCst);
                        if !number.is_multiple_of(5) {
                            head.link(slot, &mut scratch);
                        }
                        mine.push_back(slot);
                        if mine.len() > 150
                            && let Some(old) = mine.pop_front()
                            && !old.0.is_multiple_of(3)
                        {
                            assert!(head.delete(old));
                            gone[old.0 as usize].store(true, Ordering::SeqCst);
                        }
                        head.tend(&mut scratch);
                    }
                })
            })
            .collect();
        for reader in 0..2 {
            let (head, gone, rows, stop, asked) = (&head, &gone, &rows, &stop, &asked);
            scope.spawn(move || {
                let (mut scratch, mut out, mut random) = (Scratch::default(), Vec::new(), Random(77 + reader));
                while !stop.load(Ordering::SeqCst) {
                    let query: Vec<f32> = marked(random.next() as u32).iter().map(|b| f32::from(*b)).collect();
                    let dead: Vec<bool> = gone.iter().map(|gone| gone.load(Ordering::SeqCst)).collect();
                    let exact = random.next().is_multiple_of(4);
                    let request = Request { exact, ..Request::nearest(5) };
                    head.search(&query, &request, &mut scratch, &mut out).unwrap();
                    for hit in &out {
                        assert!(!dead[hit.slot.0 as usize], "{:?} was deleted before", hit.slot);
                        let number = rows[hit.slot.0 as usize].load(Ordering::SeqCst);
                        if number != usize::MAX {
                            assert_eq!(space.distance(&query, &marked(number as u32)), hit.distance);
                        }
                    }
                    asked.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        let done = writers.into_iter().all(|writer| writer.join().is_ok());
        stop.store(true, Ordering::SeqCst);
        assert!(done);
    });
    assert!(asked.into_inner() > 100);
    let mut scratch = Scratch::default();
    (0..head.len() as u32).for_each(|slot| head.link(Slot(slot), &mut scratch));
    head.tidy(&mut scratch);
    assert_eq!(head.reach(), Reach { points: head.live(), unreachable: 0, stale: 0 });
    assert_eq!((head.pending(), head.first_pending().0 as usize), (0, head.len()));
}

#[test]
fn deleting_all_and_beginning_anew_works() {
    let space = Space::new(4, Metric::L2, Element::F32).unwrap();
    let (rows, queries) = data(&space, 400, 3);
    let head = Mutable::scanning_below(10, space, Params { m: 4, ef_construction: 16, ..Params::default() });
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    for tidied in [false, true, false] {
        let slots: Vec<Slot> = rows.chunks_exact(space.row_bytes()).map(|row| head.push(row)).collect();
        slots.iter().step_by(2).for_each(|slot| head.link(*slot, &mut scratch));
        slots.iter().for_each(|slot| assert!(head.delete(*slot)));
        assert_eq!((head.live(), head.pending()), (0, 0));
        head.search(&queries[0], &Request::nearest(10), &mut scratch, &mut out).unwrap();
        assert!(out.is_empty());
        if tidied {
            head.tidy(&mut scratch);
        }
        // What comes after is linked and found.
        let slot = head.push(&rows[..16]);
        head.link(slot, &mut scratch);
        head.search(&queries[0], &Request::nearest(10), &mut scratch, &mut out).unwrap();
        assert_eq!(out.iter().map(|hit| hit.slot).collect::<Vec<_>>(), [slot]);
        assert!(head.delete(slot) && !head.delete(slot));
        assert_eq!(head.update(slot, &rows[..16]), None);
    }
}

#[test]
fn equal_points_stay_within_reach() {
    let space = Space::new(2, Metric::L2, Element::F32).unwrap();
    let head = Mutable::scanning_below(10, space, Params { m: 4, ef_construction: 16, ..Params::default() });
    let mut scratch = Scratch::default();
    let mut row = Vec::new();
    for n in 0..1_200 {
        row.clear();
        // Three heaps of equal points, far from each other, and some between.
        let at = if n % 10 == 0 { n as f32 } else { (n % 3) as f32 * 5_000.0 };
        space.encode(&[at, 1.0], &mut row).unwrap();
        head.link(head.push(&row), &mut scratch);
    }
    head.tidy(&mut scratch);
    assert_eq!(head.reach(), Reach { points: 1_200, unreachable: 0, stale: 0 });
}

/// Passes the slots that `0` lets pass, a share of all that is given.
struct Passing<F>(F, Option<f32>);

impl<F: Fn(Slot) -> bool + Sync> Filter for Passing<F> {
    fn allows(&self, slot: Slot) -> bool {
        (self.0)(slot)
    }
    fn selectivity(&self) -> Option<f32> {
        self.1
    }
}

#[test]
fn a_filtered_head_gives_k_hits_where_k_exist() {
    let space = Space::new(16, Metric::L2, Element::F32).unwrap();
    let n = 3_000;
    let (rows, queries) = data(&space, n, 41);
    let head = Mutable::scanning_below(0, space, Params { ef_construction: 80, ..Params::default() });
    let mut scratch = Scratch::default();
    for row in rows.chunks_exact(space.row_bytes()) {
        head.link(head.push(row), &mut scratch);
    }
    let (mut truth, mut found) = (Vec::new(), Vec::new());
    // One in so many slots, whatever the query; or those that are farther than so many others.
    for (far, one_in) in [(false, 2), (false, 10), (false, 100), (false, 1_500), (true, 2), (true, 10), (true, 100)] {
        for told in [true, false] {
            let (mut right, mut all) = (0, 0);
            for query in &queries {
                let exact = Request { exact: true, ..Request::nearest(n) };
                head.search(query, &exact, &mut scratch, &mut truth).unwrap();
                let mut rank = vec![0; n];
                truth.iter().enumerate().for_each(|(at, hit)| rank[hit.slot.0 as usize] = at);
                let passes = |slot: Slot| match far {
                    true => rank[slot.0 as usize] >= n - n / one_in,
                    false => (slot.0 as usize).is_multiple_of(one_in),
                };
                let filter = Passing(passes, told.then_some(1.0 / one_in as f32));
                let request = Request { filter: Some(&filter), ..Request::nearest(10) };
                head.search(query, &Request { exact: true, ..request.clone() }, &mut scratch, &mut truth).unwrap();
                head.search(query, &request, &mut scratch, &mut found).unwrap();
                assert_eq!(found.len(), 10.min(n / one_in));
                right += found.iter().filter(|hit| truth.contains(hit)).count();
                all += truth.len();
            }
            assert!(right as f64 >= 0.95 * all as f64, "far {far}, 1 in {one_in}, told {told}: {right} of {all}");
        }
    }
}

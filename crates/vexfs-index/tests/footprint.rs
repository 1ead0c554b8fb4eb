//! What a search or an insert takes: stack, by painting it; memory, by an allocator that counts. A target of its own,
//! since an allocator is for a whole process.
#![allow(unsafe_code, reason = "an allocator, and a look at one's own stack, can't be had without")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use vexfs_index::*;

struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> usize {
    let before = COUNT.get();
    work();
    COUNT.get() - before
}

const PAINT: u64 = 0x5a17_ed57_ac4b_10c5;
/// Bytes that are painted, and those of them next to this function's frame that are not.
const AREA: usize = 128 << 10;
const OWN: usize = 512;

/// Bytes of stack below its own frame that `work` touched.
#[inline(never)]
fn stack_of(work: impl FnOnce()) -> usize {
    let here = 0u64;
    let top = (&raw const here as usize) & !7;
    let (mut at, end) = (top - AREA, top - OWN);
    while at < end {
        // SAFETY: below this frame, on a stack that is 2 MiB large, nothing is alive.
        unsafe { std::ptr::write_volatile(at as *mut u64, PAINT) };
        at += 8;
    }
    work();
    at = top - AREA;
    // SAFETY: as above; painted by now, or written by `work`.
    while at < end && unsafe { std::ptr::read_volatile(at as *const u64) } == PAINT {
        at += 8;
    }
    top - at
}

/// Bytes of stack that a search or an insert may take.
const MOST_STACK: usize = 4 << 10;

fn rows(space: &Space, n: u32) -> Vec<u8> {
    let mut rows = Vec::new();
    for point in 0..n {
        let mut state = u64::from(point) + 1;
        let row: Vec<f32> = (0..space.dim())
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) % 100 + 1) as f32
            })
            .collect();
        space.encode(&row, &mut rows).unwrap();
    }
    rows
}

/// Searches of every plan; the first time round fills the scratch, which then is enough.
fn check(name: &str, index: &dyn Index, query: &[f32]) {
    let words = index.len().div_ceil(64);
    let (half, few) = (Bits(vec![0x5555_5555_5555_5555; words]), Bits(vec![1; words]));
    let nearest = Request::nearest(10);
    let requests = [
        ("nearest", nearest.clone()),
        ("exact", Request { exact: true, ..nearest.clone() }),
        ("half", Request { filter: Some(&half), ..nearest.clone() }),
        ("few", Request { filter: Some(&few), ..nearest.clone() }),
        ("range", Request { max_distance: Some(0.05), k: 200, ..nearest.clone() }),
    ];
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    for (plan, request) in &requests {
        let mut search = || index.search(query, request, &mut scratch, &mut out).map(drop).unwrap();
        search();
        let (count, stack) = (allocations(&mut search), stack_of(&mut search));
        eprintln!("{name} {plan}: {count} allocations, {stack} bytes of stack");
        assert_eq!(count, 0, "{name} {plan}");
        assert!(stack <= MOST_STACK, "{name} {plan}: {stack}");
    }
}

#[test]
fn a_warm_search_allocates_nothing_and_stays_within_4_kib_of_stack() {
    for element in [Element::F32, Element::F16, Element::U8] {
        let space = Space::new(48, Metric::Cosine, element).unwrap();
        let rows = rows(&space, 6_000);
        let mut query = Vec::new();
        space.decode(&rows[..space.row_bytes()], &mut query);
        for quantization in [Quantization::None, Quantization::Sq8, Quantization::Sq4, Quantization::Rabitq] {
            let params = Params { quantization, ..Params::default() };
            let built = build(&space, &rows, &params, 2, &|| true).unwrap();
            let [vectors, codes, graph] = [built.vectors, built.codes, built.graph].map(region_from);
            let index = Sealed::open(space, vectors, codes, graph).unwrap();
            index.warm();
            check(&format!("sealed {element} {quantization}"), &index, &query);
        }
        check(&format!("flat {element}"), &Flat::new(space, region(&rows)), &query);
        let head = Mutable::new(space, Params::default());
        let mut scratch = Scratch::default();
        let mut most = 0;
        for row in rows.chunks_exact(space.row_bytes()) {
            most = most.max(stack_of(|| {
                let slot = head.push(row);
                head.link(slot, &mut scratch);
            }));
        }
        eprintln!("head {element}: push and link take {most} bytes of stack");
        assert!(most <= MOST_STACK, "head {element}: {most}");
        check(&format!("head {element}"), &head, &query);
    }
}

#![allow(clippy::panic, reason = "a test")]

use super::*;

#[test]
fn a_panic_in_a_handler_is_eio_and_counted() {
    let before = PANICS.load(Ordering::Relaxed);
    assert_eq!(Handling::of("panics").guard::<()>(|| panic!("on purpose")), Err(Errno::IO));
    assert_eq!(PANICS.load(Ordering::Relaxed), before + 1);
    assert_eq!(stacks().get("panics"), None);
}

/// Writes that many bytes of stack.
#[inline(never)]
fn take<const BYTES: usize>() {
    std::hint::black_box([7u8; BYTES]);
}

#[test]
fn the_stack_of_a_handler_is_measured() {
    let most = |operation, work: fn()| {
        // A thread of its own, whose first frame is near.
        let handle = move || drop((Handling::of(operation), work()));
        assert!(std::thread::spawn(handle).join().is_ok());
        stacks()[operation]
    };
    let (little, more) = (most("little", || ()), most("more", take::<20_000>));
    assert!(little < 4096, "{little}");
    assert!((20_000..20_000 + 4096).contains(&more), "{more}");
    // What comes after and takes less doesn't hide it.
    assert_eq!(most("more", || ()), more);
}

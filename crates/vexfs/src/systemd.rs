//! What systemd is told of a daemon that it started: that the mount answers, goes on answering, ends (sd_notify(3)).

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::park_timeout;

use sd_notify::NotifyState;
use vexfs_fs::mount::Mounted;

/// Tells it; nobody listens where systemd didn't start us.
pub fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("systemd can't be told: {error}");
    }
}

/// Keeps the watchdog quiet for as long as the mount answers; until `over`, and the thread is unparked.
pub fn keep_watchdog(mounted: &Mounted, over: &AtomicBool) {
    let Some(patience) = sd_notify::watchdog_enabled() else { return };
    while !over.load(Ordering::Acquire) {
        match mounted.answers() {
            Ok(()) => tell(NotifyState::Watchdog),
            Err(error) => log::warn!("the mount doesn't answer: {error}"),
        }
        park_timeout(patience / 3);
    }
}

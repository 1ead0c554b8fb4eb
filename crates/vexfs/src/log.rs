//! The log: lines on standard error, as systemd's journal and people read them.

use std::io::Write;

struct Stderr;

static STDERR: Stderr = Stderr;

impl log::Log for Stderr {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        // fuser tells of what we answer for ourselves.
        if !self.enabled(record.metadata()) || !record.target().starts_with("vexfs") {
            return;
        }
        // The journal's priorities (sd-daemon(3)).
        let priority = match record.level() {
            log::Level::Error => 3,
            log::Level::Warn => 4,
            log::Level::Info => 6,
            log::Level::Debug | log::Level::Trace => 7,
        };
        // With standard error gone there is nobody to tell.
        drop(writeln!(std::io::stderr().lock(), "<{priority}>vexfs: {}", record.args()));
    }

    fn flush(&self) {}
}

/// Warnings and errors, or what `VEXFS_LOG` says: error, warn, info, debug.
pub fn start() {
    let level = std::env::var("VEXFS_LOG").ok().and_then(|level| level.parse().ok());
    if log::set_logger(&STDERR).is_ok() {
        log::set_max_level(level.unwrap_or(log::LevelFilter::Warn));
    }
    // What a handler panicked of belongs in the log, in its form; the handler's caller is answered EIO.
    std::panic::set_hook(Box::new(|panic| {
        log::error!("{panic}\n{}", std::backtrace::Backtrace::force_capture());
    }));
}

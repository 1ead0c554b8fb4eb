//! Threads for what takes more stack than a request's handler may: reading vectors, searching, committing. The handler
//! waits meanwhile, so there is nothing to gain from more of them than there are handlers.

use rayon_core::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::handling::Handling;

/// See the module.
pub struct Pool(ThreadPool);

impl Pool {
    /// Of so many threads, which start here.
    pub fn new(threads: usize) -> Result<Pool, ThreadPoolBuildError> {
        let named = ThreadPoolBuilder::new().thread_name(|number| format!("vexfs-pool-{number}"));
        Ok(Pool(named.num_threads(threads).build()?))
    }

    /// Does `work` on one of the threads; a panic in it is the caller's. From within it is done where it is.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.0.install(|| {
            let _handling = Handling::of("pool");
            work()
        })
    }
}

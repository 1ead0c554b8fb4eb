//! Random histories beside a plain model, the simulated source: after each step exactly what it holds is found, each
//! vector under its name, and the same after a remount.
//!
//! `cargo test` takes 40 seeds of 100 steps; `VEXFS_MODEL=N` takes N.

use super::world::{Source, World};
use crate::disk::{MemDisk, Survivors};

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % n
    }
}

const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// Returns the step in words, and the world: a remount makes another one.
fn step(mut world: World, random: &mut Random) -> (String, World) {
    let (one, other) = (NAMES[random.below(8)], NAMES[random.below(8)]);
    let op = random.below(23);
    match op {
        0..=3 => world.create(one, 1 + random.below(3)),
        4 | 5 => world.overwrite(one),
        6 => world.append(one),
        7 | 8 => world.rename(one, other),
        9 | 10 => world.unlink(one),
        11 | 12 => world.link(one, other),
        13 => world.exchange(one, other),
        14 => world.truncate(one),
        15 => world.fsync(one).unwrap(),
        16 => world.seal().unwrap(),
        17 => world.merge().unwrap(),
        18 => world.volume.commit().unwrap(),
        19 | 20 => world.attach(one),
        21 => world.detach(one),
        _ => {
            let kill = random.below(2) == 0;
            let World { source, volume, disk, .. } = world;
            if !kill {
                volume.close().unwrap();
            }
            // A kill loses nothing that was written; what was not committed is found by the walk.
            let mut again = World::mount(disk.crash_with(Survivors::All), source, "first").unwrap();
            again.found().unwrap();
            again.walk();
            again.count_from(random.below(1 << 20) as u32 * 1_000);
            world = again;
        }
    }
    (format!("{op} {one} {other}"), world)
}

#[test]
fn any_history_ends_with_what_the_files_hold() {
    let seeds: u64 = std::env::var("VEXFS_MODEL").map_or(40, |value| value.parse().unwrap());
    let start = std::time::Instant::now();
    for seed in 1..=seeds {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut world = World::mount(MemDisk::default(), Source::default(), "first").unwrap();
        world.walk();
        let mut history = Vec::new();
        for _ in 0..100 {
            let (what, next) = step(world, &mut random);
            world = next;
            history.push(what);
            if let Err(error) = world.exact("then") {
                panic!("seed {seed} after {history:?}: {error}");
            }
        }
        let World { source, volume, disk, .. } = world;
        volume.close().unwrap();
        assert!(!crate::check(&disk.crash(), false).unwrap().has_errors(), "seed {seed}");
        let world = World::mount(disk.crash(), source, "first").unwrap();
        world.exact("after a clean remount, before the walk").unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
    eprintln!("{} steps over {seeds} seeds, {:.1?}", seeds * 100, start.elapsed());
}

#![no_main]
//! Any bytes as a `.npy` file.

use std::fs::File;
use std::io::Write;

use libfuzzer_sys::fuzz_target;
use vexfs_fs::formats::{Format, Source};
use vexfs_fs::index::{Element, Metric, Space};

fn file(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::empty()).expect("memory");
    let mut file = File::from(fd);
    file.write_all(bytes).expect("memory");
    file
}

fuzz_target!(|data: &[u8]| {
    let Ok(Some(source)) = Source::open(Format::Npy, &file(data)) else { return };
    let shape = source.shape();
    assert!(shape.rows > 0 && shape.dimension > 0);
    let metric = if data.len() % 2 == 0 { Metric::L2 } else { Metric::Cosine };
    for element in [shape.element, Element::F16, Element::U8] {
        let Ok(space) = Space::new(shape.dimension, metric, element) else { continue };
        let Ok(Some(source)) = Source::open(Format::Npy, &file(data)) else { panic!("it was good before") };
        if let Ok(rows) = source.encode(&space) {
            assert_eq!(rows.len(), shape.rows * space.row_bytes());
        }
    }
    if let Ok(rows) = source.rows() {
        assert!(rows.len() == shape.rows && rows.iter().all(|row| row.len() == shape.dimension));
    }
});

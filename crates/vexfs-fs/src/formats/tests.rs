use std::io::Write;

use proptest::prelude::*;
use vexfs_store::index::Metric;

use super::*;

fn read(format: Format, bytes: &[u8]) -> Result<Option<Vec<Vec<f32>>>, Refusal> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Source::open(format, &file)?.map(Source::rows).transpose()
}

fn header(shape: &str) -> Vec<u8> {
    let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.bytes());
    bytes
}

#[test]
fn names_tell_the_format() {
    let of = |name: &str| Format::of(OsStr::new(name));
    assert_eq!(of("a.vec"), Some(Format::Text));
    assert_eq!(of("a.b.NPY"), Some(Format::Npy));
    assert_eq!(of(".vec"), Some(Format::Text));
    for name in ["vec", "a.vec~", "a.vec.tmp", "a.", "", "npy"] {
        assert_eq!(of(name), None, "{name}");
    }
}

#[test]
fn text_is_numbers_separated_by_commas_blanks_and_line_ends() {
    for text in
        ["1,2.5,-3e2", "1 2.5 -3e2", " 1\t2.5\r\n-300\n", "1\n2.5\n-300", "1, 2.5,\n-300", "\n\n1 , 2.5 ,-3.0E+2\n\n"]
    {
        // A line end after a comma begins a line of another length where there are several to a line.
        match text {
            "1, 2.5,\n-300" => assert!(text::parse(text).is_err(), "{text:?}"),
            " 1\t2.5\r\n-300\n" => assert!(text::parse(text).is_err(), "{text:?}"),
            _ => assert_eq!(text::parse(text), Ok(Some(vec![1.0, 2.5, -300.0])), "{text:?}"),
        }
    }
    assert_eq!(text::parse("1 2\n3 4\n"), Ok(Some(vec![1.0, 2.0, 3.0, 4.0])));
    assert_eq!(text::parse(" \n\t"), Ok(None));
}

#[test]
fn a_row_that_isnt_there_is_said_so() {
    let mut bytes = header("(2, 1)");
    bytes.extend([0; 8]);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    let source = Source::open(Format::Npy, &file).unwrap().unwrap();
    assert_eq!(source.row(2).unwrap_err().errno, Errno::NODATA);
}

proptest! {
    #[test]
    fn any_text_is_a_vector_or_a_refusal(text in "[-0-9., \n\te]{0,60}|\\PC{0,30}") {
        if let Ok(Some(vector)) = text::parse(&text) {
            prop_assert!(vector.iter().all(|value| value.is_finite()));
        }
    }

    #[test]
    fn vectors_survive_being_written_as_text(vector in prop::collection::vec(-1e30f32..1e30, 1..50)) {
        let text = vector.iter().map(f32::to_string).collect::<Vec<_>>().join(", ");
        prop_assert_eq!(text::parse(&text), Ok(Some(vector)));
    }

    #[test]
    fn any_bytes_are_an_array_or_a_refusal(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
        let _: Result<_, Refusal> = read(Format::Npy, &bytes);
        // And what looks like an array for longer.
        let mut almost = header("(3, 5)");
        almost.extend(&bytes);
        let at = cut % almost.len();
        almost[at] ^= 1 << (cut % 8);
        let _: Result<_, Refusal> = read(Format::Npy, &almost);
        almost.truncate(at);
        let _: Result<_, Refusal> = read(Format::Npy, &almost);
    }

    #[test]
    fn any_shape_is_read_or_refused(rows in any::<u64>(), columns in any::<u64>(), data in 0usize..200) {
        let mut bytes = header(&format!("({rows}, {columns})"));
        bytes.resize(bytes.len() + data, 0);
        if let Ok(Some(found)) = read(Format::Npy, &bytes) {
            prop_assert!(found.len() as u64 == rows && found[0].len() as u64 == columns);
        }
    }
}

/// A file in Fortran order is read a block of rows at a time: here there are several, the last of them shorter.
#[test]
fn columns_become_rows_whatever_the_number_of_blocks() {
    let (rows, columns) = (1_100, 4_096);
    let fields = format!("{{'descr': '|i1', 'fortran_order': True, 'shape': ({rows}, {columns}), }}");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((fields.len() as u16).to_le_bytes());
    bytes.extend(fields.bytes());
    let value = |row: usize, column: usize| ((row * 31 + column * 7) % 255) as u8 as i8;
    bytes.extend((0..columns).flat_map(|column| (0..rows).map(move |row| value(row, column) as u8)));
    let read = read(Format::Npy, &bytes).unwrap().unwrap();
    assert_eq!(read.len(), rows);
    for (row, numbers) in read.iter().enumerate() {
        assert!(numbers.iter().enumerate().all(|(column, got)| *got == f32::from(value(row, column))), "{row}");
    }
}

#[test]
fn rows_are_encoded_for_the_collection() {
    let mut bytes = header("(2, 2)");
    bytes.extend([3f32, 4.0, 0.0, 2.0].iter().flat_map(|value| value.to_le_bytes()));
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    let space = Space::new(2, Metric::Cosine, Element::F32).unwrap();
    let rows = Source::open(Format::Npy, &file).unwrap().unwrap().encode(&space).unwrap();
    let mut first = Vec::new();
    space.decode(&rows[..8], &mut first);
    assert_eq!(first, [0.6, 0.8]);
}

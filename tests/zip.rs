//! Archives for the corpus of broken files and for the fuzz targets, which are a package of their own.

/// A zip archive of stored entries, as `torch.save` writes it but for padding and check sums.
pub fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in entries {
        let header = file.len() as u32;
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0, 0, 0, 0, 0];
        common.extend((content.len() as u32).to_le_bytes().repeat(2));
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        file.extend(b"PK\x03\x04".iter().chain(&common).chain(name.as_bytes()).chain(*content));
        directory.extend(b"PK\x01\x02\x14\x00".iter().chain(&common).chain(&[0; 10]));
        directory.extend(header.to_le_bytes().iter().chain(name.as_bytes()));
    }
    let (start, count) = (file.len() as u32, (entries.len() as u16).to_le_bytes());
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0".iter().chain(&count).chain(&count));
    file.extend((directory.len() as u32).to_le_bytes().iter().chain(&start.to_le_bytes()).chain(&[0, 0]));
    file
}

//! A table in plain text.

/// A line of titles and one for each row, the columns two spaces apart. The first `num_texts` of them are flush left, the
/// others, which hold numbers, flush right. A row has a cell for each title.
pub fn columns(titles: &[&str], rows: &[impl AsRef<[String]>], num_texts: usize) -> String {
    let titles: Vec<String> = titles.iter().map(|&title| title.to_owned()).collect();
    let lines: Vec<&[String]> = std::iter::once(&*titles).chain(rows.iter().map(AsRef::as_ref)).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let mut table = String::new();
    for line in lines {
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column < num_texts {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        });
        table.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        table.push('\n');
    }
    table
}

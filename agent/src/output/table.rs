//! Tables: ruled on a terminal, plain columns when piped.

use comfy_table::{CellAlignment, ContentArrangement, presets};

/// To which side a column's cells go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Rows under named columns.
#[derive(Debug)]
pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these columns.
    #[must_use]
    pub fn new(columns: &[(&'static str, Align)]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row: one cell for each column.
    ///
    /// # Panics
    /// Where the number of cells is not the number of columns.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let row = cells.into_iter().collect::<Vec<_>>();
        assert_eq!(row.len(), self.columns.len(), "a row has one cell for each column");
        self.rows.push(row);
    }

    /// The table as text that ends with a line feed. When piped it has neither colours nor rules. Cells are
    /// never broken into lines.
    #[must_use]
    pub fn render(&self, terminal: bool) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING);
        if terminal {
            table.load_style(presets::UTF8_HORIZONTAL_ONLY);
        } else {
            table.force_no_tty();
        }
        // A name that was broken into lines could not be copied; the terminal wraps what does not fit.
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(self.columns.iter().map(|(name, _)| *name));
        table.add_rows(&self.rows);
        let last = self.columns.len().saturating_sub(1);
        for (index, (_, align)) in self.columns.iter().enumerate() {
            let Some(column) = table.column_mut(index) else { continue };
            column.set_padding((0, if index == last { 0 } else { 2 }));
            if *align == Align::Right {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.trim_fmt() + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_in_one_piece_on_any_terminal() {
        let mut table = Table::new(&[("SNAPSHOT", Align::Left), ("NOTE", Align::Left)]);
        table.row(["web01@2026-11-21T00:33:12Z".to_owned(), "x".repeat(300)]);
        assert!(table.render(true).contains("web01@2026-11-21T00:33:12Z"));
    }

    #[test]
    fn a_piped_table_is_plain_columns() {
        let mut table = Table::new(&[("SNAPSHOT", Align::Left), ("SIZE", Align::Right)]);
        table.row(["web01@2026-11-21T00:33:12Z".to_owned(), "8.0 GiB".to_owned()]);
        table.row(["db".to_owned(), "64.0 KiB".to_owned()]);
        assert_eq!(
            table.render(false),
            "SNAPSHOT                        SIZE\n\
             web01@2026-11-21T00:33:12Z   8.0 GiB\n\
             db                          64.0 KiB\n"
        );
    }
}

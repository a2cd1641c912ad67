"""What is known of money: journal, holds and the projection of the chain. The only room that speaks SQL."""

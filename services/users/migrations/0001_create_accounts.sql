CREATE TABLE accounts (
    id              uuid PRIMARY KEY,
    email           text NOT NULL CONSTRAINT accounts_email_key UNIQUE, -- normalised
    email_verified  boolean NOT NULL DEFAULT false,
    password_hash   text NOT NULL,
    display_name    text NOT NULL,
    bio             text NOT NULL DEFAULT '',
    locale          text NOT NULL DEFAULT 'en',
    role            text NOT NULL DEFAULT 'user' CHECK (role IN ('user', 'admin')),
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    version         bigint NOT NULL DEFAULT 1
);

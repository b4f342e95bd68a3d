-- Declare the pool normal or degraded, as it was decided by what `weigh` had counted.
--
-- ARGV version       of the declaration that the decision went out from
-- ARGV weighed_ms    when that was counted
-- ARGV mode          'degraded' or 'normal'
-- ARGV since         ms since 1970: from when it has been so
-- ARGV until_ms      ms since 1970: when a degraded pool counts as normal again although nobody has said so
-- ARGV live          workers that live and are ready ...
-- ARGV expected      ... of so many
-- ARGV seen          '1' if there has ever been one
-- ARGV recovering    ms since 1970: since when there are enough again; 0 while there are not
-- ARGV dwell         ms that this must last
-- ARGV lowest        the fewest workers counted ...
-- ARGV lowest_since  ... since this (ms since 1970)
-- ARGV asked         capacity that was configured; 0 for none
-- ARGV asked_until   ms since 1970: until when it holds
-- ARGV peaks         the most workers that lasted, `<span>:<number>` for each span of time, with spaces between
--
-- Returns  'ok', or 'stale': somebody else has declared meanwhile (or this is sent again), or the count is too old.
--          Then nothing is written: the next sweep counts again
--
-- Any number of reapers decide at any time. One of those that went out from the same declaration is heard, so that
-- two that think differently never undo each other's decision without having seen it.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/time
--- @include lib/pool/mode

never_refused()

local version, weighed_ms = tonumber(arg()), tonumber(arg())
local mode, since, until_ms, live, expected, seen = arg(), arg(), arg(), arg(), arg(), arg()
local recovering, dwell, lowest, lowest_since = arg(), arg(), arg(), arg()
local asked, asked_until, peaks = arg(), arg(), arg()

if number_of(redis.call('HGET', KEY.mode, 'version')) ~= version then return 'stale' end
if weighed_ms > now_ms or now_ms - weighed_ms > 5000 then return 'stale' end

local was = redis.call('HGET', KEY.mode, 'mode')
if mode == 'degraded' and not degraded() then
  add(KEY.counters, 'degraded', 1)
elseif mode ~= 'degraded' and was == 'degraded' then
  add(KEY.counters, 'recovered', 1)
end
redis.call('HSET', KEY.mode, 'version', int(version + 1), 'mode', mode, 'since', since, 'until', until_ms, 'live', live,
  'expected', expected, 'seen', seen, 'recovering', recovering, 'dwell', dwell, 'lowest', lowest,
  'lowest_since', lowest_since, 'asked', asked, 'asked_until', asked_until, 'peaks', peaks)
redis.call('EXPIRE', KEY.mode, DAY)
return 'ok'

--- @include lib/counters
--- @include lib/dates
--- @include lib/end_waiting
--- @include lib/forget
--- @include lib/hint
--- @include lib/history
--- @include lib/numbers
--- @include lib/retention
--- @include lib/time

-- Canceled by RQ's Job.cancel while it waited: RQ has written status and registry, the rest is ours.
local function settle_canceled(id)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'task', 'last')
  local verdict = string.match(job[2] or '', ':(%a+)$')
  if not job[1] or verdict == 'canceled' or verdict == 'stopped' then return end
  redis.call('HSET', name, 'last', '-:canceled', 'ended_at', utc())
  end_waiting('', id, true)
  drop_checkpoint(id)
  history(id, 'canceled', '', '', '0', '', 'canceled by RQ while it waited')
  count('canceled', redis.call('HGET', name, 'origin') or '')
  share_ttl(id, number_of(redis.call('HGET', name, 'failure_ttl'), 7 * DAY))
  hint(redis.call('HGET', name, 'client'), id, 'end')
end

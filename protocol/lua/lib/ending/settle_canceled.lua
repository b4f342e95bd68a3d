--- @include lib/basics/dates
--- @include lib/ending/close_canceled
--- @include lib/ending/end_waiting
--- @include lib/ending/is_canceled
--- @include lib/failure/verdict

-- End a waiting request that RQ's Job.cancel has canceled: RQ has written status and registry, the rest follows here.
local function settle_canceled(id)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'task', 'last', 'origin')
  if not job[1] or is_canceled(verdict_of(job[2])) then return end
  redis.call('HSET', name, 'last', '-:canceled', 'ended_at', utc())
  end_waiting('', id, true)
  close_canceled(job[3] or '', id, '', '', 'canceled', 'canceled by RQ while it waited')
end
